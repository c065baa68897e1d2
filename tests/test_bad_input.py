"""Bad input that tests/soak/bad_input.py has found, and tests of that script."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image

from mmseg_volo import ARCHITECTURES, VOLO, StreamSampler
from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.plotting import plot
from mmseg_volo.benchmark.sliding import benchmark_sliding
from mmseg_volo.benchmark.step import profile_step
from mmseg_volo.config import load_config
from mmseg_volo.datasets.full_check import check_all_data
from mmseg_volo.datasets.toy_streets import make_toy_streets, parse_size
from mmseg_volo.error_messages import one_sentence_errors
from mmseg_volo.errors import UserError
from mmseg_volo.evaluation.report import read_run

CONFIG = str(ROOT / 'configs/volo_tiny_toy_streets.py')


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with toy streets and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp('place')
    make_toy_streets(folder / 'toy', 2, 1, (64, 48))
    init_default_scope('mmseg')
    model = MODELS.build(load_config(CONFIG, {}).model)
    torch.save(dict(state_dict=model.state_dict()), folder / 'random.pth')
    return folder


def sentence(action, capsys) -> str:
    """The sentence with which ``action`` must end."""
    with pytest.raises(SystemExit) as end, one_sentence_errors():
        action()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: '), lines
    return lines[0]


# Configs


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'model': 3}, 'model must be of type dict, got 3'),
        ({'model.decode_head.num_classes': None}, 'model.decode_head.num_classes must be of type int, got None'),
        ({'train_dataloader': 'a'}, "train_dataloader must be of type dict, got 'a'"),
        ({'val_dataloader.batch_size': 'two'}, "val_dataloader.batch_size must be of type int, got 'two'"),
        ({'test_dataloader.dataset': [1]}, r'test_dataloader.dataset must be of type dict, got \[1\]'),
        ({'train_dataloader.dataset.dataset': 1}, 'a data set must be a dict, got 1'),
        ({'train_dataloader.dataset.datasets': 1}, 'datasets must be of type .*, got 1'),
        ({'train_dataloader.dataset.data_prefix.img_path': None}, 'data_prefix.img_path must be of type str, got None'),
        ({'data_root': 3}, 'data_root must be of type .*, got 3'),
        ({'test_dataloader.dataset.pipeline': 3}, 'a pipeline must be a list, got 3'),
        ({'tta_pipeline': [{'type': 'TestTimeAug', 'transforms': 3}]}, 'a pipeline must be a list, got 3'),
        ({'test_dataloader.dataset.pipeline': [3]}, 'a pipeline step must be a dict with a type, got 3'),
        ({'test_dataloader.dataset.pipeline.1': 3}, 'dataset.pipeline.1 cannot be set in .*: AttributeError'),
        (
            {'tta_pipeline': [{'type': 'TestTimeAug', 'transforms': [[{}]]}]},
            'a pipeline step must be a dict with a type, got {}',
        ),
        ({'custom_hooks': 1.5}, r'custom_hooks must be of type list \| None, got 1.5'),
        ({'param_scheduler.9.end': 1}, r'param_scheduler\.9\.end cannot be set in .*: KeyError'),
        ({'crop_size': 1, 'crop_size.x': 1}, r'crop_size, crop_size\.x cannot be set in .*: TypeError'),
    ],
)
def test_what_the_tools_read_of_a_config_is_what_they_need(options, message):
    with pytest.raises(UserError, match=message):
        load_config(CONFIG, options)


@pytest.mark.parametrize('text', ['raise SystemExit(0)', 'x = (', '1/0', "_base_ = ['config.py']", 'a = "\\ud800"\n\0'])
def test_a_config_file_that_does_not_load_is_named(tmp_path, text):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(UserError, match=r'config .*config\.py does not load: '):
        load_config(str(tmp_path / 'config.py'), {})


def test_what_mmengine_raises_while_it_builds_names_what_it_built(place, capsys, monkeypatch):
    options = {'data_root': str(place / 'toy'), 'val_dataloader.dataset.a': 1}

    def check():
        check_all_data(CONFIG, str(place / 'look.png'), ['val'], options)

    said = sentence(check, capsys)
    assert 'the config cannot be used: CityscapesDataset: TypeError: ' in said and "argument 'a'" in said
    monkeypatch.setenv('MMSEG_VOLO_TRACEBACK', '1')
    with pytest.raises(TypeError), one_sentence_errors():
        check()
    assert not (place / 'look.png').exists()


def test_weights_that_cannot_be_initialised_are_one_sentence(capsys):
    init_default_scope('mmseg')
    model = MODELS.build(load_config(CONFIG, {'model.backbone.init_cfg': -1}).model)
    assert "the config cannot be used: TypeError: 'int' object is not iterable" in sentence(model.init_weights, capsys)


def test_labels_without_a_folder_are_missed_before_they_are_read(place):
    options = {
        'data_root': str(place / 'toy'),
        'val_dataloader.dataset.data_prefix': {'_delete_': True, 'img_path': '.'},
    }
    with pytest.raises(UserError, match='the val data loads labels, but has no data_prefix.seg_map_path'):
        check_all_data(CONFIG, str(place / 'look.png'), ['val'], options)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_sentence_errors():
        print(1 / 0)


def test_a_defect_of_ours_keeps_its_traceback_where_mmengine_builds(monkeypatch):
    init_default_scope('mmseg')
    # The end of one of our modules, with a defect: it calls a method that does not exist.
    code = compile('def freeze(self):\n    self.frozen_module()', str(ROOT / 'mmseg_volo/models/volo.py'), 'exec')
    exec(code, planted := {})
    monkeypatch.setattr(VOLO, 'freeze', planted['freeze'])
    with pytest.raises(AttributeError, match='frozen_module'), one_sentence_errors():
        MODELS.build(dict(type='VOLO', arch='tiny'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'model.backbone.depth': 3}, "VOLO: TypeError: .*unexpected keyword argument 'depth'"),
        ({'model.depth': 3}, "SlidingSegmentor: TypeError: .*unexpected keyword argument 'depth'"),
        ({'model.backbone.img_size': 'abc'}, "img_size must be a side or .*, got 'abc'"),
        ({'model.backbone.img_size': [1, 2, 3]}, r'img_size must be a side or .*, got \[1, 2, 3\]'),
        ({'model.backbone.drop_path_rate': 'abc'}, "drop_path_rate must be a number from 0 to 1, got 'abc'"),
        ({'model.backbone.attn_drop_rate': float('nan')}, 'attn_drop_rate must be a number from 0 to 1, got nan'),
        ({'model.backbone.out_indices': 3}, 'out_indices must be ascending numbers from 0 to 3, got 3'),
        ({'model.backbone.arch': 3}, 'an arch dict must have exactly the keys .*, got 3'),
        ({'model.test_cfg': 'whole'}, "test_cfg must be a dict, got 'whole'"),
        (
            {'model.test_cfg': dict(mode='slide', crop_size=64, stride=(32, 32))},
            'stride must be between .* and crop_size 64, got',
        ),
    ],
)
def test_a_mistake_in_the_config_of_our_classes_is_one_sentence(options, message, capsys):
    init_default_scope('mmseg')
    assert re.search(message, sentence(lambda: MODELS.build(load_config(CONFIG, options).model), capsys))


@pytest.mark.parametrize('changes', [dict(layers=(1, 1)), dict(layers=3), dict(embed_dims='ab'), dict(mlp_ratio=[3])])
def test_a_custom_architecture_that_cannot_be_is_one_sentence(changes, capsys):
    assert 'got ' in sentence(lambda: VOLO({**ARCHITECTURES['tiny'], **changes}), capsys)


def test_a_seed_that_cannot_be_is_one_sentence():
    with pytest.raises(UserError, match="the seed must be an integer from 0 to .*, got 'abc'"):
        StreamSampler(range(3), seed='abc')


# Paths and numbers


def test_a_path_that_cannot_be_is_one_sentence(capsys):
    assert 'File name too long: ' in sentence(lambda: load_config('x' * 300, {}), capsys)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: profile_step(CONFIG, images=0), '--images must be at least 1, got 0'),
        (lambda: profile_step(CONFIG, batch=-1), '--batch must be at least 1, got -1'),
        (lambda: benchmark_sliding(CONFIG, sizes=[64, -1]), '--sizes must be at least 1, got -1'),
        (lambda: infer(CONFIG, 'x.pth', [CONFIG], 'nowhere', device='meta'), '--device meta cannot be used'),
        (lambda: parse_size('9' * 5000 + 'x1'), 'size must be WIDTHxHEIGHT'),
    ],
)
def test_numbers_and_devices_out_of_range(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Files


@pytest.mark.parametrize('size', [(30000, 1), (1, 3000)])
def test_a_picture_too_slim_for_the_model_is_skipped(place, tmp_path, size, capsys):
    paths = [str(tmp_path / name) for name in ('slim.png', 'sound.png')]
    Image.new('RGB', size).save(paths[0])
    Image.new('RGB', (64, 48)).save(paths[1])
    options = {'test_dataloader.dataset.pipeline.1.scale': (64, 48)}
    assert infer(CONFIG, str(place / 'random.pth'), paths, str(tmp_path / 'out'), cfg_options=options) == paths[:1]
    assert f'slim.png is {size[0]} x {size[1]}, too small or too narrow for this model' in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / 'out').rglob('*.png'))] == ['sound.png'] * 2


def test_flat_pictures_of_a_data_set_are_drawn_no_wider_than_a_screen(place, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(place / 'toy', data)
    for path in data.rglob('*.png'):
        Image.new('RGB' if 'leftImg' in path.name else 'L', (30000, 2)).save(path)
    check_all_data(CONFIG, str(tmp_path / 'look.png'), ['val'], {'data_root': str(data)})
    assert Image.open(tmp_path / 'look.png').width < 3000


def test_a_video_whose_name_is_no_text_is_refused(place, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b'/\xff.avi')
    Path(path).touch()
    with pytest.raises(UserError, match='cannot be decoded as a video'):
        infer(CONFIG, str(place / 'random.pth'), [path], str(tmp_path / 'out'))


def test_file_names_that_are_no_text_can_be_printed(capsys):
    with one_sentence_errors():
        print('\udcff')
    assert capsys.readouterr().out == '\\udcff\n'


@pytest.mark.parametrize(
    'line', ['3', '{"loss": 1.0}', '{"step": 1, "loss": "a"}', '{"step": [], "lr": 1}', '{', '\udcff']
)
def test_a_log_that_is_damaged_is_named(tmp_path, line):
    log = tmp_path / 'run/1/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_bytes(os.fsencode(line + '\n'))
    with pytest.raises(UserError, match=r'scalars\.json is damaged'):
        plot([str(tmp_path / 'run')], str(tmp_path / 'plot.png'))
    assert not (tmp_path / 'plot.png').exists()


@pytest.mark.parametrize('damage', ['cut', 'no draws', 'no metrics', 'a list'])
def test_another_run_that_is_damaged_is_refused_before_testing(tmp_path, damage):
    record = dict(classes=[dict(name='a', IoU=1.0)], images_sha256='0', metrics=dict(mIoU=1.0, aAcc=1.0))
    draws = dict(mIoU=np.ones(9), aAcc=np.ones(9), IoU=np.ones((9, 1)))
    if damage == 'no draws':
        del draws['IoU']
    if damage == 'no metrics':
        del record['metrics']
    (tmp_path / 'metrics.json').write_text(json.dumps([record] if damage == 'a list' else record))
    np.savez_compressed(tmp_path / 'bootstrap.npz', **draws)
    if damage == 'cut':
        whole = (tmp_path / 'bootstrap.npz').read_bytes()
        (tmp_path / 'bootstrap.npz').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match='needs a metrics.json written by mmseg-volo test, with its bootstrap.npz'):
        read_run(str(tmp_path / 'metrics.json'), ['a'], '0')


# The soak test itself


@pytest.fixture(scope='module')
def soak():
    spec = importlib.util.spec_from_file_location('bad_input', ROOT / 'tests/soak/bad_input.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['bad_input'] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('tool', 'ending'),
    [
        (lambda: 0, 'fine'),
        (lambda: (print('error: no', file=sys.stderr), sys.exit(2)), 'refused'),
        (lambda: sys.exit(2), 'status 2 without one sentence'),
        (lambda: 1 / 0, 'traceback: ZeroDivisionError'),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 'crash: signal 9'),
        (lambda: os.read(os.pipe()[0], 1), 'hang: '),
        (lambda: Path('.partial-a.png').touch() or 0, 'partial output: .partial-a.png'),
        (lambda: Path('a.png').write_bytes(b'half') * 0, 'partial output: a.png'),
    ],
    ids=['fine', 'refused', 'no sentence', 'traceback', 'crash', 'hang', 'partial name', 'partial file'],
)
def test_the_soak_test_tells_endings_apart(soak, tmp_path, monkeypatch, tool, ending):
    monkeypatch.setattr(soak, 'run_command', lambda command, arguments: tool())
    monkeypatch.setattr(soak, 'LIMIT', 3)
    assert soak.run_alone(lambda case: ('plot', []), (), tmp_path)[0].startswith(ending)


def test_the_soak_test_makes_a_failing_case_smaller(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, 'run_command', lambda command, arguments: '--size' in arguments and 1 / 0)
    counts, failed = soak.draw(soak.commands, 0, tmp_path)
    assert failed.startswith("commands, seed 0: ('toy-streets', [])\n  traceback: ZeroDivisionError"), failed
    assert counts['traceback'] == 1 and counts['cases'] == counts['fine'] + 1
