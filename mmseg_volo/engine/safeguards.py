"""Hooks that stop or warn when training goes wrong."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from .._files import whole
from ..errors import UserError


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Keep non-finite losses and gradients away from the weights, save the batch, and stop when there are too many.

    Costs little: where gradients are clipped by their norm, the check uses that norm, which mmengine has copied to the
    host anyway; else it computes one and waits for it. Processes exchange nothing, because averaged gradients are the
    same in all of them. With loss scaling (``--amp`` in float16), overflowing gradients are left to the scaler and not
    counted.

    Args:
        skip: number of batches that may be skipped before training stops.
    """

    def __init__(self, skip: int = 0):
        self.skip = skip
        self.skipped = 0

    def before_train(self, runner: Runner) -> None:
        """Check the gradients before each optimizer step."""
        self.gradients_are_finite = True

        def check(optimizer: torch.optim.Optimizer, *_: object) -> None:
            parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            self.gradients_are_finite = math.isfinite(_gradient_norm(runner.optim_wrapper, parameters))
            if not self.gradients_are_finite:
                for parameter in parameters:
                    parameter.grad = None  # the optimizer then leaves the weight and its moments alone

        runner.optim_wrapper.optimizer.register_step_pre_hook(check)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Copy the running statistics, which a forward pass changes, if the batch may have to be skipped."""
        if self.skip:
            self.buffers = {name: buffer.clone() for name, buffer in runner.model.named_buffers()}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict) -> None:
        """Skip the batch if its loss or gradients are not finite.

        Raises:
            UserError: more than ``skip`` batches; names the iteration, the learning rate and the files.
        """
        loss = float(outputs['loss'].detach())  # no wait: mmengine has just logged it
        finite = math.isfinite(loss) and self.gradients_are_finite
        self.gradients_are_finite = True
        if finite:
            return
        self.skipped += 1
        number = runner.iter + 1
        rate = runner.optim_wrapper.get_lr()['lr'][0]
        files = [sample.img_path for sample in data_batch['data_samples']]
        path = Path(runner.work_dir) / f'non_finite_iter_{number}_rank_{runner.rank}.pth'
        labels = [sample.gt_sem_seg.data for sample in data_batch['data_samples'] if 'gt_sem_seg' in sample]
        with whole(path) as partial:
            torch.save(dict(inputs=list(data_batch['inputs']), labels=labels, files=files), partial)
        sentence = (
            f'the loss ({loss:g}) or its gradients are not finite at iteration {number} '
            f'(learning rate {rate:g}); the batch is saved as {path}: {", ".join(files)}'
        )
        if self.skipped > self.skip:
            raise UserError(
                f'{sentence}; inspect it, lower the learning rate, or skip such batches with '
                f'--cfg-options default_hooks.non_finite.skip={10 * max(self.skip, 1)}'
            )
        with torch.no_grad():
            for name, buffer in runner.model.named_buffers():
                buffer.copy_(self.buffers[name])
        runner.logger.warning(f'{sentence}; skipped, {self.skipped} of at most {self.skip}')


def _gradient_norm(wrapper: OptimWrapper, parameters: Sequence[torch.nn.Parameter]) -> float:
    """Norm of all gradients; the one that clipping has just logged where it can be used."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = any(isinstance(gradient, DTensor) for gradient in gradients)  # clipping logs the norm of one share
    if wrapper.clip_grad_kwargs and wrapper.clip_func is clip_grad_norm_ and gradients and not sharded:
        return wrapper.message_hub.get_scalar('train/grad_norm').current()
    norm = get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@HOOKS.register_module()
class OneClassWarningHook(Hook):
    """Warn if a validation predicts the same class for every pixel."""

    def before_val_epoch(self, runner: Runner) -> None:
        """Forget the last validation."""
        self.lowest, self.highest = torch.iinfo(torch.int64).max, -1

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[SegDataSample]
    ) -> None:
        """Note the lowest and the highest class of a batch."""
        for sample in outputs:
            low, high = torch.aminmax(sample.pred_sem_seg.data)
            self.lowest, self.highest = min(self.lowest, int(low)), max(self.highest, int(high))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Log the warning; it names the class."""
        extremes = torch.tensor([-self.lowest, self.highest])
        all_reduce(extremes, 'max')
        if -extremes[0] == extremes[1]:
            name = runner.val_dataloader.dataset.metainfo['classes'][extremes[1]]
            runner.logger.warning(
                f'the validation at iteration {runner.iter} predicts {name!r} for every pixel: training has collapsed, '
                'has hardly begun, or learns from wrong labels (mmseg-volo check-data finds those)'
            )
