import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from torch import nn

import mmseg_volo.benchmark.backbone as module
from mmseg_volo.apis.training import _enable_amp
from mmseg_volo.benchmark import attention, heads
from mmseg_volo.benchmark.memory import LiveMemory
from mmseg_volo.benchmark.segmentor import largest_batch, segmentor_speed
from mmseg_volo.benchmark.step import profile_step
from mmseg_volo.benchmark.suite import TITLES, run_benchmark
from mmseg_volo.benchmark.tables import parity_row
from mmseg_volo.benchmark.timing import paired_times
from mmseg_volo.errors import UserError
from mmseg_volo_cli import parser


@pytest.fixture
def small(monkeypatch):
    """The benchmark with sizes that run quickly."""
    monkeypatch.setattr(module, 'FORWARD', {'d1@32': 1})
    monkeypatch.setattr(module, 'TRAIN', {'d1@32': 1})
    monkeypatch.setattr(module, 'OPERATOR', {'d1@64': (8, 8, 6)})
    monkeypatch.setattr(module, 'ACTIVATIONS', ['d1@32'])
    monkeypatch.setattr(module, 'INFERENCE_PEAK', 'd1@256')
    monkeypatch.setattr(module, 'PARITY', (['d1'], (32, 48)))
    monkeypatch.setattr(heads, 'CELLS', {'tiny': ('volo_tiny_camvid', (48, 64), 1)})
    monkeypatch.setattr(heads, 'HEAD_ALONE', 'tiny')
    monkeypatch.setattr(heads, 'PARITY', (['tiny'], (48, 64)))
    monkeypatch.setattr(attention, 'PARITY', [(3, 5)])
    monkeypatch.setattr(attention, 'TIMED', (4, 6))
    monkeypatch.setattr(attention, 'LARGE', (16, 16))


def test_the_table_is_printed_and_returned(small, capsys, tmp_path):
    result = run_benchmark('cpu', quick=True, out=str(tmp_path / 'numbers.json'))
    printed = capsys.readouterr().out
    assert list(result['tables']) == ['parity', *TITLES]
    for row in result['tables']['forward']:
        assert set(row['seconds']) == {'ours', 'timm', 'authors'} and row['ours'] in printed
    assert all(row['met'] for row in result['tables']['parity'])
    assert f'torch: {torch.__version__}' in printed
    assert (tmp_path / 'numbers.json').stat().st_size > 1000
    assert not any('target' in row for rows in result['tables'].values() for row in rows)
    kept, checkpointed, peak = (row['bytes'] for row in result['tables']['memory'])
    assert checkpointed['ours'] < kept['ours'] < kept['timm'] and min(peak.values()) > 0
    assert [row['what'] for row in result['tables']['segmentor']] == [
        'forward tiny', 'train step tiny', 'forward decode head of tiny', 'train step decode head of tiny',
    ]  # fmt: skip
    (kept,) = (row['bytes'] for row in result['tables']['segmentor-memory'])
    assert kept['ours'] < kept['mmseg']
    forward, step, _ = result['tables']['biased-attention']
    assert (forward['what'], step['what']) == ('forward 4x6', 'train step 4x6')
    assert set(step['seconds']) == {'ours', 'timm', 'timm unfused'}


def test_one_table_is_measured_alone(small, capsys):
    assert list(run_benchmark('cpu', quick=True, tables=['segmentor-memory'])['tables']) == [
        'parity',
        'segmentor-memory',
    ]


def test_attention_is_compared_with_all_gradients(small, monkeypatch, capsys):
    found = run_benchmark('cpu', quick=True, tables=['biased-attention'])['tables']['parity']
    names = ['output', 'd q', 'd k', 'd v', 'd table']
    assert [row['what'] for row in found] == [f'attention 3x5: {name}' for name in names]
    right = attention.biased_attention
    monkeypatch.setattr(attention, 'biased_attention', lambda *args, grid: right(*args, grid=grid) * 1.01)
    with pytest.raises(UserError, match='parity failed, so no speed is measured: attention 3x5: output'):
        run_benchmark('cpu', quick=True, tables=['biased-attention'])


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
def test_flex_attention_has_the_same_bias():
    torch.manual_seed(0)
    qkv, table = torch.randn(3, 1, 2, 15, 16), torch.randn(2, 5, 9)
    found = attention.flex_attention(*qkv, table, (3, 5))
    assert torch.allclose(found, attention.biased_attention(qkv, table, grid=(3, 5)), atol=1e-6)


def test_the_command_offers_every_table(capsys):
    assert list(parser().parse_args(['benchmark']).tables) == list(TITLES)


def test_no_speed_is_measured_where_parity_fails(small, monkeypatch, capsys):
    right = module.outlook_attention
    monkeypatch.setattr(module, 'outlook_attention', lambda *args, **geometry: right(*args, **geometry) * 1.01)
    with pytest.raises(UserError, match='parity failed, so no speed is measured: operator'):
        run_benchmark('cpu', quick=True)
    assert 'floors:' not in capsys.readouterr().out  # and nothing is timed afterwards


def test_a_nan_fails_parity():
    exact = torch.ones(3)
    row = parity_row('x', torch.tensor([1.0, float('nan'), 1.0]), exact, exact)
    assert row['met'] is False


def test_parity_allows_twice_the_error_of_the_other_or_a_tolerance():
    exact = torch.ones(3, dtype=torch.float64)
    for mine, theirs, settings, met in (
        (2.5e-6, 1.5e-6, {}, True),
        (1.5e-6, 0.5e-6, {}, False),
        (1.5e-6, 0.5e-6, dict(float32=2e-6), True),
        (2.5e-6, 0.5e-6, dict(float32=2e-6), False),
    ):
        row = parity_row('x', (exact + mine).float(), (exact + theirs).float(), exact, **settings)
        assert row['met'] is met


def test_contenders_alternate():
    order = []
    times = paired_times({name: lambda name=name: order.append(name) for name in 'ab'}, 2, 'cpu')
    assert order == ['a', 'b'] * 3 and [len(seconds) for seconds in times.values()] == [2, 2]


def test_a_contender_that_runs_out_of_memory_has_no_times():
    def too_large():
        raise torch.OutOfMemoryError

    assert list(paired_times(dict(ours=lambda: None, theirs=too_large), 2, 'cpu')) == ['ours']


def test_live_memory_counts_saved_activations():
    x = torch.randn(1000, requires_grad=True)
    with LiveMemory() as memory:
        y = x.exp().sum()  # exp keeps its result for the backward pass
        kept = memory.live()
    assert kept == 4 * 1000 + 4
    del y
    assert memory.live() == 0
    with LiveMemory() as memory, torch.no_grad():
        y = nn.functional.relu(x * 2)
        assert memory.live() == y.nbytes == 4000


def test_a_whole_segmentor_is_measured(tmp_path):
    row = segmentor_speed(str(ROOT / 'configs/volo_tiny_toy_streets.py'), 'cpu', rounds=1)
    assert row['config'] == 'volo_tiny_toy_streets' and row['batch'] == 4
    assert row['images/s'] == pytest.approx(4 / row['step, s'], rel=0.01) and row['hours on 8'] > 0


@pytest.mark.parametrize('room', [1, 2, 5, 8, 23])
def test_largest_batch_is_found_by_trying(room):
    def step(batch):
        if batch > room:
            raise torch.OutOfMemoryError

    assert largest_batch(step, 2) == room


def test_profile_names_every_part_of_a_step(capsys):
    rows = profile_step('volo_tiny_camvid', 'cpu', 2, 2, dict(crop_size=(32, 64)))
    assert [row['part'] for row in rows] == [
        'backbone', 'neck', 'decode head', "decode head's loss at full size", 'auxiliary head',
        "auxiliary head's loss at full size", 'optimizer step (AdamW)',
    ]  # fmt: skip
    assert all(row['forward'] > 0 for row in rows) and all(row['kept'] > 0 for row in rows[:3])
    printed = capsys.readouterr().out
    assert 'RandomResize' in printed and 'images/s per worker' in printed


def test_a_segmentor_without_auxiliary_head_is_profiled():
    rows = profile_step('volo_tiny_toy_streets', 'cpu', 2, 2, dict(crop_size=(32, 64)))
    assert len(rows) == 5


@pytest.mark.parametrize(
    ('tool', 'arguments', 'sentence'),
    [
        ('benchmark.py', ['--out', 'numbers.txt'], '--out must be a .json file, got numbers.txt'),
        ('profile_step.py', ['nowhere.py'], 'config not found: nowhere.py'),
    ],
)
def test_wrong_arguments_end_with_one_sentence(tool, arguments, sentence):
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / tool, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 2 and sentence in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.parametrize(
    ('options', 'bf16', 'expected'),
    [
        ({}, True, ('bfloat16', 1.0)),
        ({}, False, ('float16', 'dynamic')),
        (dict(dtype='float16'), True, ('float16', 'dynamic')),
        (dict(loss_scale=512.0), False, ('float16', 512.0)),
    ],
    ids=str,
)
def test_amp_takes_bfloat16_where_the_device_has_it(options, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: bf16)
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', **options)))
    _enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert (cfg.optim_wrapper.dtype, cfg.optim_wrapper.loss_scale) == expected
