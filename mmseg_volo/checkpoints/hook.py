"""Checkpoints that survive interruptions: full disks, signals and killed processes."""

import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from .._files import PARTIAL, whole
from ..errors import UserError
from .mmengine_loader import read_ahead

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_EVERY = 10  # iterations after which distributed processes tell each other about signals


@register_backend('durable')
class DurableBackend(LocalBackend):
    """Local files that appear only when they are completely on the disk, and stay until ``remove_outdated``."""

    def __init__(self):
        self.outdated: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` under a temporary name, flush it and rename it; raises ``UserError`` if the disk is full."""
        path = Path(filepath)
        try:
            with whole(path) as partial, partial.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # otherwise a power cut may undo the rename
            finally:
                os.close(folder)
        except OSError as error:
            raise UserError(
                f'cannot write {path} ({error.strerror}); free some space and continue with --resume: the earlier '
                'checkpoints are intact'
            ) from None

    def remove(self, filepath: str | Path) -> None:
        """Mark ``filepath`` for removal by ``remove_outdated``."""
        self.outdated.append(str(filepath))

    def remove_outdated(self) -> None:
        """Remove the files that were marked."""
        while self.outdated:
            Path(self.outdated.pop()).unlink(missing_ok=True)


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook for runs that may be killed at any time: a resumed run ends as an undisturbed one does.

    A checkpoint appears when it is complete, and only then are older ones removed. A validation that was due when the
    run was killed runs first on resuming. SIGTERM and Ctrl-C end the training after the current iteration: a
    checkpoint is saved, and the process exits with 128 + the signal's number. A second signal stops it at once.
    The arguments are those of CheckpointHook.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, backend_args=dict(backend='durable'))
        self.asked_to_stop = 0
        self.saved_iter = None
        self.validating = False
        self.previous_handlers: dict = {}

    def before_train(self, runner: Runner) -> None:
        """Catch signals, clean up after a killed run, and validate if that was due next."""
        super().before_train(runner)
        self._catch_signals(runner)
        self.file_backend.remove_outdated()
        if is_main_process():
            outdated = runner.message_hub.runtime_info.get('outdated_checkpoints', [])
            unfinished = Path(self.out_dir).glob(f'{PARTIAL}*')
            for name in (*outdated, *unfinished):
                Path(self.out_dir, Path(name).name).unlink(missing_ok=True)
        if runner.iter:  # resumed
            self.last_ckpt, self.saved_iter = runner.message_hub.runtime_info.get('last_ckpt'), runner.iter
            if _validation_is_due(runner):
                runner.message_hub.update_info('iter', runner.iter - 1)  # as in mmengine's other validations
                runner.val_loop.run()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Record in the checkpoint which files it replaces."""
        names = [Path(path).name for path in self.file_backend.outdated]
        checkpoint['message_hub']['runtime_info']['outdated_checkpoints'] = names

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save a checkpoint if one is due or a signal came; in the latter case exit."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if get_world_size() == 1 or self.every_n_train_iters(runner, AGREE_EVERY):
            number = self._agreed_signal()
            if number:
                if self.saved_iter != runner.iter + 1:
                    self._save_checkpoint(runner)
                self._exit(number)

    def before_val_epoch(self, runner: Runner) -> None:
        """Save nothing from here on, because the model may hold averaged weights."""
        self.validating = True

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Save the best checkpoint so far."""
        self.validating = False
        super().after_val_epoch(runner, metrics)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Exit if a signal came and the checkpoint is up to date: the validation is repeated on resuming."""
        if self.asked_to_stop and get_world_size() == 1 and self.last_ckpt and self.saved_iter == runner.iter:
            self._exit(self.asked_to_stop)

    def after_run(self, runner: Runner) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def exit_if_asked(self, runner: Runner) -> None:
        """Save a checkpoint and exit if a signal came, when the iteration cannot end for lack of data."""
        if self.asked_to_stop:
            if not self.validating and self.saved_iter != runner.iter:
                self._save_checkpoint_with_step(runner, runner.iter, dict(epoch=runner.epoch, iter=runner.iter))
            self._exit(self.asked_to_stop)

    def _catch_signals(self, runner: Runner) -> None:
        if self.previous_handlers or threading.current_thread() is not threading.main_thread():
            return  # Python allows signal handlers in the main thread only
        process, training = os.getpid(), type(runner).train.__code__

        def note(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a data-loader worker, which the training still needs
                return
            self._restore_handlers()
            if not any(caller.f_code is training for caller, _ in traceback.walk_stack(frame)):
                signal.raise_signal(number)  # an exception ended the training, which no hook is told
                return
            self.asked_to_stop = number
            # Slurm sends SIGTERM to data-loader workers, too; torch would raise an error as soon as one ends.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

        self.previous_handlers = {number: signal.signal(number, note) for number in SIGNALS}

    def _restore_handlers(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.previous_handlers = {}

    def _exit(self, number: int) -> NoReturn:
        """Exit with the status that shells give to a process ended by this signal."""
        if is_main_process():
            how = f'continue with --resume from {self.last_ckpt}' if self.last_ckpt else 'no checkpoint was due yet'
            print(f'stopped by {signal.Signals(number).name}; {how}', file=sys.stderr)
        sys.exit(128 + number)

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
    """Path and contents of a run's newest readable checkpoint; newer damaged ones are skipped with a warning.

    Raises:
        UserError: every checkpoint in ``folder`` is damaged.
    """
    names = ((path, re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', path.name)) for path in Path(folder).glob('*.pth'))
    found = {path: int(name[1]) for path, name in names if name}
    newest_first = sorted(found, key=lambda path: -found[path])
    for path in newest_first:
        try:
            return str(path), read_ahead(str(path))
        except UserError as error:
            MMLogger.get_current_instance().warning(f'skipped when resuming: {error}')
    if newest_first:
        raise UserError(
            f'every checkpoint in {folder} is damaged; move them away to start anew, or choose another --work-dir'
        )
    return None


def _validation_is_due(runner: Runner) -> bool:
    loop = runner.train_loop
    return (
        runner.val_loop is not None
        and loop.iter >= loop.val_begin
        and (loop.iter % loop.val_interval == 0 or loop.iter == loop.max_iters)
    )
