"""A hook that logs the memory of a training on a CPU."""

import sys

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

try:
    import resource
except ImportError:  # Windows
    resource = None

UNITS_PER_MB = 2**20 if sys.platform == 'darwin' else 2**10  # macOS counts bytes, Linux KB


@HOOKS.register_module()
class CPUMemoryHook(Hook):
    """Log the peak resident memory in MB if no GPU is available; on a GPU mmengine logs its memory. Not on Windows."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Once per iteration."""
        if resource is not None and not torch.cuda.is_available():
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            runner.message_hub.update_scalar('train/memory', peak // UNITS_PER_MB)
