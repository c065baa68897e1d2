"""Training that goes wrong says so."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from torch.nn.utils import get_total_norm

from .._files import whole
from ..errors import UserError


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Keep a loss or gradient that is not finite out of the weights, save its batch, and stop after too many.

    With loss scaling (``--amp`` in float16) gradients that overflow are the scaler's business and not counted.

    Args:
        skip: batches that may be left out before training stops.
    """

    def __init__(self, skip: int = 0):
        self.skip = skip
        self.skipped = 0

    def before_train(self, runner: Runner) -> None:
        """Look at the gradients before each step of the optimizer."""
        self.gradients_are_finite = True
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._drop_gradients_unless_finite)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keep the running statistics, which a forward pass changes."""
        if self.skip:
            self.buffers = {name: buffer.clone() for name, buffer in runner.model.named_buffers()}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict) -> None:
        """Once per iteration.

        Raises:
            UserError: one batch too many; names the iteration, the learning rate and the files.
        """
        loss = float(outputs['loss'].detach())
        finite = math.isfinite(loss) and self.gradients_are_finite
        self.gradients_are_finite = True
        anywhere = torch.tensor(int(not finite))
        all_reduce(anywhere, 'max')
        if not anywhere:
            return
        self.skipped += 1
        number = runner.iter + 1
        rate = runner.optim_wrapper.get_lr()['lr'][0]
        files = [sample.img_path for sample in data_batch['data_samples']]
        path = Path(runner.work_dir) / f'non_finite_iter_{number}_rank_{runner.rank}.pth'
        labels = [sample.gt_sem_seg.data for sample in data_batch['data_samples']]
        with whole(path) as partial:
            torch.save(dict(inputs=list(data_batch['inputs']), labels=labels, files=files), partial)
        sentence = (
            f'the loss ({loss:g}) or its gradients are not finite at iteration {number} '
            f'(learning rate {rate:g}); the batch is saved as {path}: {", ".join(files)}'
        )
        if self.skipped > self.skip:
            raise UserError(
                f'{sentence}; look at it, lower the learning rate, or skip some with '
                f'--cfg-options default_hooks.non_finite.skip={10 * max(self.skip, 1)}'
            )
        with torch.no_grad():
            for name, buffer in runner.model.named_buffers():
                buffer.copy_(self.buffers[name])
        runner.logger.warning(f'{sentence}; skipped, {self.skipped} of at most {self.skip}')

    def _drop_gradients_unless_finite(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        self.gradients_are_finite = bool(torch.isfinite(get_total_norm([p.grad for p in parameters])))
        if not self.gradients_are_finite:
            for parameter in parameters:
                parameter.grad = None  # the optimizer leaves it and its moments alone


@HOOKS.register_module()
class OneClassWarningHook(Hook):
    """Warn after a validation that predicted one class in every pixel."""

    def before_val_epoch(self, runner: Runner) -> None:
        """Forget the last validation."""
        self.lowest, self.highest = torch.iinfo(torch.int64).max, -1

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[SegDataSample]
    ) -> None:
        """Once per batch."""
        for sample in outputs:
            low, high = torch.aminmax(sample.pred_sem_seg.data)
            self.lowest, self.highest = min(self.lowest, int(low)), max(self.highest, int(high))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Warn, with the class."""
        extremes = torch.tensor([-self.lowest, self.highest])
        all_reduce(extremes, 'max')
        if -extremes[0] == extremes[1]:
            name = runner.val_dataloader.dataset.metainfo['classes'][extremes[1]]
            runner.logger.warning(
                f'validation at iteration {runner.iter} predicts {name!r} in every pixel: training has collapsed, has '
                'hardly begun, or learns from wrong labels (tools/check_data.py looks at them)'
            )
