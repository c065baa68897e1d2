"""Memory of a training on a CPU."""

import resource

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS


@HOOKS.register_module()
class CPUMemoryHook(Hook):
    """Log the peak resident memory in MB where there is no GPU, whose memory mmengine logs itself."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Once per iteration."""
        if not torch.cuda.is_available():
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            runner.message_hub.update_scalar('train/memory', kilobytes // 1024)
