"""A hook that ends a training once the score of the validation no longer rises."""

import math

from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from ..errors import UserError


@HOOKS.register_module()
class DurableEarlyStoppingHook(EarlyStoppingHook):
    """mmengine's EarlyStoppingHook for runs that may be killed: the count of validations is stored in checkpoints.

    A resumed run therefore stops where an undisturbed one does.

    Args:
        monitor: a score of the validation.
        patience: number of validations in a row that may pass without a new best score.
        min_delta: least amount by which a new best score exceeds the last, in the score's unit: per cent for ``mIoU``.

    Raises:
        UserError: an argument has an invalid value, there is no validation, or it has no score of that name.
    """

    def __init__(self, monitor: str = 'mIoU', patience: int = 5, min_delta: float = 0.1):
        if type(patience) is not int or patience < 1:
            raise UserError(f'patience must be an integer of at least 1, got {patience!r}')
        if not isinstance(min_delta, int | float) or not 0 < min_delta < math.inf:  # mmengine: with 0 equal is better
            raise UserError(f'min_delta must be a number above 0, got {min_delta!r}')
        super().__init__(monitor, rule='greater', min_delta=min_delta, patience=patience)

    def before_run(self, runner: Runner) -> None:
        """Nothing: a test has no training loop, and to look for it, as mmengine does, would build one."""

    def before_train(self, runner: Runner) -> None:
        """Begin to count, unless the run is resumed."""
        if runner.val_loop is None:
            raise UserError(f'{type(self).__name__} needs a validation, but the config has no val_dataloader')
        if not runner.iter:
            runner.message_hub.update_info('early_stopping', self._nothing_counted())

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Stop the training if no recent validation was better."""
        if self.monitor not in (metrics or {}):
            raise UserError(
                f'{type(self).__name__} monitors {self.monitor!r}, but the validation has {", ".join(metrics or {})}'
            )
        counted, before, after = runner.message_hub.get_info('early_stopping', self._nothing_counted())
        before = before if counted == runner.iter else after  # a resumed run may repeat its last validation
        self.wait_count, self.best_score = before
        super().after_val_epoch(runner, metrics)
        after = [self.wait_count, float(self.best_score)]
        runner.message_hub.update_info('early_stopping', [runner.iter, before, after])
        if runner.train_loop.stop_training:
            why = f'{self.wait_count} validations did not exceed {self.best_score:.2f} by {self.min_delta:g}'
            if not math.isfinite(metrics[self.monitor]):
                why = 'that is no finite number'
            runner.logger.info(
                f'stopped at iteration {runner.iter}: {self.monitor} is {metrics[self.monitor]:.2f}, and {why}'
            )

    def _nothing_counted(self) -> list:
        """Iteration of the last validation that was counted, and the count and the best score before and after it."""
        return [0, *[[self.wait_count, self.best_score]] * 2]
