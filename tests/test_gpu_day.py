"""tools/gpu_day.py: what it would run exists, it goes on where it stopped, and a rehearsal on a CPU runs every kind."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from mmseg_volo.config import load_config
from mmseg_volo_cli import parser

spec = importlib.util.spec_from_file_location('gpu_day', ROOT / 'tools/gpu_day.py')
gpu_day = importlib.util.module_from_spec(spec)
sys.modules['gpu_day'] = gpu_day  # dataclass looks its module up
spec.loader.exec_module(gpu_day)


def test_every_part_is_a_command_and_all_fit_into_their_time(tmp_path):
    parts = gpu_day.parts('cuda', '/data/camvid', tmp_path / 'a b')
    for part in parts:
        if 'mmseg_volo_cli' in part.words:
            parser().parse_args(part.words[2:])
    names = [part.name for part in parts]
    assert len(set(names)) == len(names) and {part.after for part in parts} - {None} <= set(names)
    unresumable = sum(part.seconds for part in parts if not part.resumes)
    assert unresumable <= 60 * gpu_day.MINUTES
    assert gpu_day.parts('cuda', None, tmp_path)[-1].name == 'same_seed'


@pytest.mark.parametrize('config', gpu_day.ON_CAMVID)
def test_the_last_checkpoint_has_this_name(config):
    assert load_config(config, {}).train_cfg.max_iters == gpu_day.ON_CAMVID[config]


def call(out, *words):
    command = [sys.executable, ROOT / 'tools/gpu_day.py', out, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_rehearsal_goes_on_where_it_stopped_and_prints_one_page(tmp_path):
    out = tmp_path / 'out'
    assert 'no time left' in call(out, '--device', 'cpu', '--minutes', '0').stdout
    wanted = ['toy_streets', 'train_plain']
    first = call(out, '--device', 'cpu', '--only', 'toy_streets')
    assert first.returncode == 0, first.stdout
    second = call(out, '--device', 'cpu', '--only', *wanted)
    assert second.returncode == 0, second.stdout
    assert 'toy_streets ...' not in second.stdout
    assert set(json.loads((out / 'done.json').read_text())) == set(wanted)
    page = (out / 'gpu_day.md').read_text()
    assert 'torch 2.' in page and '| train_plain | 0 |' in page and 'loss: ' in page


def test_a_part_that_takes_too_long_is_stopped_and_run_again(tmp_path):
    sleeper = gpu_day.Part('sleeper', ('-c', 'import time; print("began", flush=True); time.sleep(60)'), 60)
    result = gpu_day.run(sleeper, tmp_path, 1)
    assert result['status'] == 'stopped' and result['seconds'] < 15
    assert 'began' in (tmp_path / 'sleeper.txt').read_text()


@pytest.mark.parametrize(
    'words, sentence', [(['--only', 'x', '--device', 'cpu'], 'no part named x'), ([], 'finds no GPU')]
)
def test_mistakes_are_one_sentence(tmp_path, words, sentence):
    import torch

    if not words and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    done = call(tmp_path / 'out', *words)
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr
