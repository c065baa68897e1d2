"""Helpers of the soak scripts: toy data, training in child processes, a table of results."""

import ast
import os
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from prettytable import PrettyTable

from mmseg_volo.apis.training import train
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.error_messages import one_sentence_errors

CONFIG = Path(__file__).parents[2] / 'configs/volo_tiny_toy_streets.py'


def arguments(description: str) -> Namespace:
    parser = ArgumentParser(description=description)
    parser.add_argument('--short', action='store_true', help='the short version, which CI runs')
    torch.set_num_threads(1)  # before any parallel region, because a forked child would lack its threads
    return parser.parse_args()


@contextmanager
def toy_place(train: int = 12, val: int = 5) -> Iterator[Path]:
    """A temporary folder with toy streets in ``toy/``."""
    place = Path(tempfile.mkdtemp(prefix='soak_'))
    try:
        make_toy_streets(place / 'toy', train=train, val=val, size=(96, 64))
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def options(place: Path, **more: object) -> dict:
    """``cfg_options`` of a short run on ``place``'s toy streets."""
    return {
        'data_root': str(place / 'toy'),
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.pipeline.3.scale': (96, 64),
        'train_dataloader.dataset.pipeline.4.crop_size': (32, 48),
        'model.data_preprocessor.size': (32, 48),
        'val_dataloader.dataset.pipeline.1.scale': (96, 64),
        'default_hooks.logger.interval': 10,
        'default_hooks.checkpoint.max_keep_ckpts': 2,
        'visualizer.vis_backends': [dict(type='LocalVisBackend')],
        **more,
    }


def start_training(work_dir: Path, **settings: object) -> int:
    """Train in a child process with its own process group; return its id. Its output goes to ``<work_dir>.log``."""
    if torch.cuda.is_available():  # a forked child could not use the GPU
        return _spawn_training(work_dir, settings)

    def work() -> None:
        with one_sentence_errors():
            train(str(CONFIG), str(work_dir), **settings)

    return start_child(work, f'{work_dir}.log')


def start_child(work: Callable[[], object], log: str = os.devnull) -> int:
    """Do ``work`` in a child process with its own process group; return its id. Its output goes to the file ``log``."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _spawn_training(work_dir: Path, settings: dict) -> int:
    log = (1, f'{work_dir}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    return os.posix_spawn(
        sys.executable,
        [sys.executable, __file__, str(work_dir), repr(settings)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, *log), (os.POSIX_SPAWN_DUP2, 1, 2)],
        setsid=True,
    )


def wait(pid: int, seconds: float = 600) -> int | None:
    """Exit status of a child, negative if a signal ended it, None if it is still running after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def kill(pid: int) -> int | None:
    """Send SIGKILL to a training process and its data-loader workers; return its status if it had already ended."""
    ended = wait(pid, 0)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return ended if ended is not None else (wait(pid), None)[1]


def differences(work_dir: Path, reference: Path) -> list[str]:
    """Parts of two checkpoints that differ in any bit, such as weights, optimizer and schedulers."""
    found = []
    names = [sorted(path.name for path in folder.glob('*.pth*')) for folder in (work_dir, reference)]
    if names[0] != names[1]:
        return [f'files {names[0]} instead of {names[1]}']
    for name in names[0]:
        one, other = (read_checkpoint(folder / name) for folder in (work_dir, reference))
        parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
        found += [f'{name}: {part}' for part in parts if not same(one.get(part), other.get(part))]
        for key in ('best_score', 'keep_ckpt_ids', 'iter'):
            values = [contents['message_hub']['runtime_info'].get(key) for contents in (one, other)]
            if values[0] != values[1]:
                found.append(f'{name}: {key} {values[0]} instead of {values[1]}')
    return found


def same(one: object, other: object) -> bool:
    """Whether two values are equal bit for bit, NaN included; looks into dicts and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Report:
    """Rows of a table; ``finish`` prints it and exits with 1 if any row failed."""

    def __init__(self, title: str):
        self.table = PrettyTable(['what', 'measured', 'limit', 'ok'], title=title, align='l')
        self.fine = True

    def row(self, what: str, measured: object, limit: object, ok: bool) -> None:
        self.table.add_row([what, measured, limit, 'yes' if ok else 'NO'])
        self.fine &= ok

    def not_run(self, what: str, reason: str) -> None:
        """Add a row for a check that cannot run here; it does not make the script fail."""
        self.table.add_row([what, reason, '', 'NOT RUN'])

    def finish(self) -> None:
        print(self.table)
        sys.exit(0 if self.fine else 1)


if __name__ == '__main__':
    with one_sentence_errors():
        train(str(CONFIG), sys.argv[1], **ast.literal_eval(sys.argv[2]))
