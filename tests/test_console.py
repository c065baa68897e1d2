"""The terminal output of training and testing: short on a terminal and in a pipe, complete in the log file."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.engine.console import WARNINGS, runner_on_terminal

COMMAND = [sys.executable, '-m', 'mmseg_volo_cli', 'train', 'volo_tiny_toy_streets', '--cfg-options']
COMMAND += ['train_cfg.max_iters=4', 'train_cfg.val_interval=4', 'default_hooks.logger.interval=2']
COMMAND += ['train_dataloader.batch_size=2', 'train_dataloader.dataset.pipeline.3.scale=(96,64)']
COMMAND += [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
COMMAND += [f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')]


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('console')
    make_toy_streets(folder / 'toy', train=4, val=2, size=(96, 64))
    return folder


def environment() -> dict:
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'TERM': 'xterm'}


@pytest.fixture(scope='module')
def piped(place) -> str:
    """What the command writes to a pipe."""
    command = [*COMMAND, 'data_root=toy', 'work_dir=piped']
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ''
    return done.stdout


def on_a_terminal(command: list[str], folder: Path) -> str:
    """What ``command`` writes to a terminal with 30 rows and 100 columns."""
    size = 'stty rows 30 cols 100; exec "$@"'
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe('sh', ['sh', '-c', size, 'sh', *command], environment())
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # on Linux, reading fails when the other end has closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, b''.join(chunks)
    return b''.join(chunks).decode()


def test_a_pipe_gets_plain_lines_at_every_interval_and_nothing_else(piped):
    lines = piped.splitlines()
    assert [line.split('  ')[0] for line in lines if 'Iter(' in line] == [
        'Iter(train) [2/4]',
        'Iter(train) [4/4]',
        'Iter(val) [2/2]',  # a line with the speed, and one with the scores
        'Iter(val) [2/2]',
    ]
    assert re.search(r'eta: 0:00:\d\d .* loss: \d', lines[2])
    assert [line.split(':')[0] for line in lines if 'Iter(' not in line] == ['train', 'val', 'best checkpoint']


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(place):
    printed = on_a_terminal([*COMMAND, 'data_root=toy', 'work_dir=terminal'], place)
    assert re.search(r'train: +\d+%\|.*\| \d/4 \[\d\d:\d\d<\d\d:\d\d, .*(it/s|s/it), loss \d\.\d{3}\]', printed)
    assert re.search(r'val: +\d+%\|', printed)
    assert re.search(r'iteration 4: .*mIoU \d+\.\d\d', printed)
    assert 'Iter(train)' not in printed and 'best checkpoint: ' in printed
    assert printed.count('\n') < 12


def test_the_log_file_and_the_scalars_are_complete(place, piped):
    (log,) = (place / 'piped').rglob('*.log')
    text = log.read_text()
    for part in ('System environment:', 'Config:', 'Hooks will be executed', 'Iter(train) [4/4]', 'best checkpoint:'):
        assert part in text
    assert re.search(r'\| +road +\|', text) and 'UserWarning' in text  # tables and Python's warnings
    (scalars,) = (place / 'piped').rglob('scalars.json')
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [row['step'] for row in rows] == [2, 4, 4] and 'mIoU' in rows[-1]


def test_verbose_prints_what_the_log_file_gets(place):
    command = [*COMMAND, 'data_root=toy', 'work_dir=verbose', '--verbose']
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'System environment:' in done.stdout and 'Hooks will be executed' in done.stdout


def test_the_warnings_of_the_caller_are_his_again_afterwards(place, tmp_path):
    own = logging.NullHandler()
    WARNINGS.addHandler(own)
    cfg = load_config('volo_tiny_toy_streets', dict(data_root=str(place / 'toy'), work_dir=str(tmp_path)))
    shown = warnings.showwarning
    with pytest.raises(ZeroDivisionError), runner_on_terminal(cfg):
        assert warnings.showwarning is not shown and not WARNINGS.propagate and len(WARNINGS.handlers) == 2
        raise ZeroDivisionError
    assert warnings.showwarning is shown and WARNINGS.propagate and WARNINGS.handlers == [own]
    WARNINGS.removeHandler(own)
