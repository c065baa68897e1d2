"""Checkpoints that survive whatever happens while they are written."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from .._files import PARTIAL, whole
from ..errors import UserError
from .reading import read_ahead

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_EVERY = 10  # iterations between two exchanges of several processes about a signal


class StoppedBySignal(Exception):
    """Training stopped because it was asked to, and can go on; says from where."""

    def __init__(self, number: int, checkpoint: str | None):
        start = checkpoint or 'the start: no checkpoint was due yet'
        super().__init__(f'stopped by {signal.Signals(number).name}; --resume goes on from {start}')
        self.number = number


@register_backend('durable')
class DurableBackend(LocalBackend):
    """A file appears under its name when all of it is on the disk; what is removed stays until ``remove_outdated``."""

    def __init__(self):
        self.outdated: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` under a temporary name, flush it, rename it; raises ``UserError`` where the disk is full."""
        path = Path(filepath)
        try:
            with whole(path) as partial, partial.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # else the rename may not outlive a power cut
            finally:
                os.close(folder)
        except OSError as error:
            raise UserError(
                f'cannot write {path} ({error.strerror}); make room and go on with --resume: earlier '
                'checkpoints are whole'
            ) from None

    def remove(self, filepath: str | Path) -> None:
        """Note ``filepath`` for ``remove_outdated``."""
        self.outdated.append(str(filepath))

    def remove_outdated(self) -> None:
        """Remove what was noted."""
        while self.outdated:
            Path(self.outdated.pop()).unlink(missing_ok=True)


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook that loses nothing: killed anywhere, the run ends as if it had not been.

    A checkpoint appears when it is whole, and those it replaces go after that. A validation that was due when the run
    died is made up for on resuming. SIGTERM and Ctrl-C save a checkpoint and raise ``StoppedBySignal``; a second one
    stops at once. Its arguments are CheckpointHook's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, backend_args=dict(backend='durable'))
        self.asked_to_stop = 0
        self.saved_iter = None
        self.validating = False

    def before_train(self, runner: Runner) -> None:
        """Tidy up after a killed run, and validate if that was due next."""
        super().before_train(runner)
        self.file_backend.remove_outdated()
        if is_main_process():
            outdated = runner.message_hub.runtime_info.get('outdated_checkpoints', [])
            unfinished = Path(self.out_dir).glob(f'{PARTIAL}*')
            for name in (*outdated, *unfinished):
                Path(self.out_dir, Path(name).name).unlink(missing_ok=True)
        if runner.iter:  # resumed
            self.last_ckpt, self.saved_iter = runner.message_hub.runtime_info.get('last_ckpt'), runner.iter
            if _validation_is_due(runner):
                runner.message_hub.update_info('iter', runner.iter - 1)  # as mmengine has it in any other validation
                runner.val_loop.run()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note in the checkpoint which files it replaces."""
        names = [Path(path).name for path in self.file_backend.outdated]
        checkpoint['message_hub']['runtime_info']['outdated_checkpoints'] = names

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save if it is time to, or if a signal came."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if get_world_size() == 1 or self.every_n_train_iters(runner, AGREE_EVERY):
            number = self._agreed_signal()
            if number:
                if self.saved_iter != runner.iter + 1:
                    self._save_checkpoint(runner)
                raise StoppedBySignal(number, self.last_ckpt)

    def before_val_epoch(self, runner: Runner) -> None:
        """From here on the model may hold averaged weights."""
        self.validating = True

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Save if it is the best so far."""
        self.validating = False
        super().after_val_epoch(runner, metrics)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stop if a signal came and nothing is lost by it: the validation comes again on resuming."""
        if self.asked_to_stop and get_world_size() == 1 and self.last_ckpt and self.saved_iter == runner.iter:
            raise StoppedBySignal(self.asked_to_stop, self.last_ckpt)

    @contextmanager
    def catching_signals(self, runner: Runner) -> Iterator[None]:
        """While inside, SIGTERM and Ctrl-C end the training after the iteration at hand; raises ``StoppedBySignal``."""
        process = os.getpid()

        def note(number: int, frame: object) -> None:
            if os.getpid() != process:  # a data-loader worker: the training still needs it
                return
            self.asked_to_stop = number
            for each, handler in before.items():
                signal.signal(each, handler)
            # Slurm sends SIGTERM to data-loader workers, too; torch would raise on their deaths at any moment.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        except RuntimeError as error:
            if not (self.asked_to_stop and 'DataLoader worker' in str(error)):
                raise
            # No more data: between two iterations, or in a validation.
            if not self.validating and self.saved_iter != runner.iter:
                self._save_checkpoint_with_step(runner, runner.iter, dict(epoch=runner.epoch, iter=runner.iter))
            raise StoppedBySignal(self.asked_to_stop, self.last_ckpt) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self.saved_iter = step
        self.file_backend.remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.remove_outdated()

    def _agreed_signal(self) -> int:
        asked = torch.tensor(self.asked_to_stop)
        all_reduce(asked, 'max')
        return int(asked)


def newest_whole_checkpoint(folder: str | Path) -> tuple[str, dict] | None:
    """Path and contents of the checkpoint of a run with the most iterations that can be read; damaged ones are named.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    found = {path: re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', path.name) for path in Path(folder).glob('*.pth')}
    newest_first = sorted((path for path in found if found[path]), key=lambda path: -int(found[path][1]))
    for path in newest_first:
        try:
            return str(path), read_ahead(str(path))
        except UserError as error:
            MMLogger.get_current_instance().warning(f'skipped on resuming: {error}')
    if newest_first:
        raise UserError(
            f'no checkpoint in {folder} is whole; move them away to start anew, or choose another --work-dir'
        )
    return None


def _validation_is_due(runner: Runner) -> bool:
    loop = runner.train_loop
    return (
        runner.val_loop is not None
        and loop.iter >= loop.val_begin
        and (loop.iter % loop.val_interval == 0 or loop.iter == loop.max_iters)
    )
