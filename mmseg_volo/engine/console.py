"""Terminal output of training and testing: a progress bar and the lines that matter; the log file gets everything."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from tqdm import tqdm

PACKAGE = Path(__file__).parents[1]
WARNINGS = logging.getLogger('py.warnings')  # where logging.captureWarnings() sends Python's warnings


@contextmanager
def runner_on_terminal(cfg: Config, verbose: bool = False) -> Iterator[Runner]:
    """Build the runner of a config, and show little of it on the terminal until the block ends.

    Shown are errors, lines logged by this package, and the progress: as a bar on a terminal, as mmengine's lines in a
    file or a pipe. Everything else, Python's warnings included, goes only into the log file.

    Args:
        cfg: a whole config; ``runner_type`` names the class.
        verbose: show everything, as mmengine does.
    """
    kind: Any = RUNNERS.get(cfg.get('runner_type', 'Runner'))
    if verbose:
        yield kind.from_cfg(cfg)
        return
    progress = ProgressHook()
    handlers, propagate = list(WARNINGS.handlers), WARNINGS.propagate
    logging.captureWarnings(True)
    WARNINGS.propagate = False
    try:
        quiet: Any = type(f'Quiet{kind.__name__}', (_QuietLogger, kind), {})
        runner = quiet.from_cfg(cfg)
        if sys.stdout.isatty() and is_main_process():
            runner.register_hook(progress)
        yield runner
    finally:
        progress.close()
        logging.captureWarnings(False)
        WARNINGS.handlers[:], WARNINGS.propagate = handlers, propagate


class ProgressHook(Hook):
    """Progress bars for the training, validation and test loops, with the loss and the scores of each validation."""

    priority = 'LOWEST'

    def __init__(self):
        self.bars: list[tqdm] = []

    def before_train(self, runner: Runner) -> None:
        """Open the bar at the iteration that training starts from."""
        self._open('train', runner.max_iters, runner.iter, leave=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Advance, and show the loss averaged over ten iterations."""
        loss = runner.message_hub.get_scalar('train/loss').mean(10)
        self.bars[-1].set_postfix_str(f'loss {loss:.3f}', refresh=False)
        self.bars[-1].update()

    def before_val(self, runner: Runner) -> None:
        """Open a bar below that of the training."""
        self._open('val', len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Advance."""
        self.bars[-1].update()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Print the scores."""
        scores = ', '.join(f'{name} {value:.2f}' for name, value in (metrics or {}).items())
        tqdm.write(f'iteration {runner.iter}: {scores}', file=sys.stdout)

    def after_val(self, runner: Runner) -> None:
        """Close."""
        self.bars.pop().close()

    def before_test(self, runner: Runner) -> None:
        """Open the bar."""
        self._open('test', len(runner.test_dataloader))

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Advance."""
        self.bars[-1].update()

    def after_test(self, runner: Runner) -> None:
        """Close."""
        self.bars.pop().close()

    def after_train(self, runner: Runner) -> None:
        """Close, and leave the finished bar on the terminal."""
        self.bars.pop().close()

    def close(self) -> None:
        """Close the bars that an exception left open."""
        while self.bars:
            self.bars.pop().close()

    def _open(self, name: str, total: int, first: int = 0, leave: bool = False) -> None:
        self.bars.append(tqdm(desc=name, total=total, initial=first, leave=leave, file=sys.stdout, dynamic_ncols=True))


class _QuietLogger(Runner):
    """Runner that quiets its logger before the first line, which comes while the runner is built."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler):
                WARNINGS.addHandler(handler)
            else:
                logger.removeHandler(handler)
                logger.addHandler(_TerminalHandler(handler.stream, handler.level))
        return logger


class _TerminalHandler(logging.StreamHandler):
    """Writes lines above the progress bar."""

    def __init__(self, stream, level: int):
        super().__init__(stream)
        self.setLevel(level)
        self.is_terminal = stream.isatty()

    def filter(self, record: logging.LogRecord) -> bool:
        is_progress = record.module == 'logger_hook' and not record.getMessage().startswith('Exp name')
        shown = is_progress and not self.is_terminal  # a terminal has the bar instead
        return record.levelno >= logging.ERROR or shown or PACKAGE in Path(record.pathname).parents

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f'{record.levelname.lower()}: ' if record.levelno >= logging.WARNING else ''
        try:
            tqdm.write(prefix + record.getMessage(), file=self.stream)
            self.flush()
        except Exception:  # as every handler: a line that cannot be shown must not end a training
            self.handleError(record)
