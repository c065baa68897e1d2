"""Models on the hub and in folders: written, read back bit for bit, and refused in one sentence."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from hub_server import TOKEN, Hub, Repository, running_hub
from huggingface_hub import ModelCard, constants
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from safetensors.torch import load_file, save_file
from soak import hostile_files
from soak.hostile_files import HARMFUL_MODELS, ODD_MODELS

from mmseg_volo import HVT, VOLO, CoAtNet
from mmseg_volo.apis.inference import infer
from mmseg_volo.apis.push import push
from mmseg_volo.apis.sources import load_model, split_words
from mmseg_volo.apis.testing import test as measure
from mmseg_volo.apis.training import _find_start
from mmseg_volo.checkpoints import shipped
from mmseg_volo.checkpoints.hub import CONFIG as CONFIG_JSON
from mmseg_volo.checkpoints.hub import LARGEST, WEIGHTS, model_file
from mmseg_volo.checkpoints.plain_config import LEFT_OUT, config_of, parsed_config, plain_config
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.checkpoints.state_dict import state_tensors
from mmseg_volo.config import load_config, shipped_configs
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo_cli import main, parser

CONFIG = 'volo_tiny_toy_streets'
NAME = 'hf://me/streets'
SIZE = WIDTH, HEIGHT = 96, 64
SLIDE = {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(48, 48), weighting='hann')}
INLINE = {'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False}
BINARY = {
    'model.decode_head.num_classes': 2,
    'model.decode_head.out_channels': 1,
    'model.decode_head.loss_decode.use_sigmoid': True,
}


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with toy streets and a checkpoint of the config for them."""
    folder = tmp_path_factory.mktemp('place')
    make_toy_streets(folder / 'toy', train=1, val=2, size=SIZE)
    saved(folder / 'random.pth', {})
    return folder


@pytest.fixture(scope='module')
def pushed(place) -> Path:
    """The checkpoint as a folder."""
    push(CONFIG, str(place / 'random.pth'), str(place / 'pushed'))
    return place / 'pushed'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, an empty cache, and a token."""
    with running_hub() as hub:
        for name, value in dict(
            ENDPOINT=hub.url,
            HUGGINGFACE_CO_URL_TEMPLATE=hub.url + '/{repo_id}/resolve/{revision}/{filename}',
            HF_HUB_CACHE=str(tmp_path / 'cache'),
            HF_TOKEN_PATH=str(tmp_path / 'no_token'),
            HF_HUB_DISABLE_XET=True,
            HF_HUB_OFFLINE=False,
        ).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        monkeypatch.setattr('huggingface_hub.file_download.time.sleep', lambda seconds: None)
        yield hub


@pytest.fixture
def stored(hub, pushed) -> Hub:
    """A hub that has the model."""
    hub.repositories['me/streets'] = Repository()
    hub.repositories['me/streets'].commit({path.name: path.read_bytes() for path in pushed.iterdir()})
    return hub


@pytest.fixture
def no_pages(monkeypatch) -> None:
    """Measure without report.html, which takes seconds."""

    def missing(*_: str) -> None:
        raise UserError('no pages')

    monkeypatch.setattr('mmseg_volo.evaluation.report.require', missing)


def saved(path: Path, options: dict, **more: object) -> str:
    """A checkpoint with random weights that predicts several classes."""
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(load_config(CONFIG, options).model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    meta = dict(DATASETS.get('CityscapesDataset').METAINFO)
    if options == BINARY:
        meta = {key: value[:2] for key, value in meta.items()}
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta), **more), path)
    return str(path)


def scenes(place: Path) -> list[str]:
    return sorted(str(path) for path in (place / 'toy/leftImg8bit/val').rglob('*.png'))


def labels(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / 'pred').glob('*.png'))]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# The same labels


@pytest.mark.parametrize(
    ('options', 'tta'),
    [({}, False), (SLIDE, False), ({'model.type': 'EncoderDecoder'}, False), (BINARY, False), ({}, True)],
    ids=['whole', 'slide', 'plain EncoderDecoder', 'binary', 'tta'],
)
def test_labels_from_a_folder_equal_those_of_the_checkpoint(place, tmp_path, options, tta):
    checkpoint = saved(tmp_path / 'random.pth', options)
    push(CONFIG, checkpoint, str(tmp_path / 'pushed'), cfg_options=options)
    scene = scenes(place)[:1]
    infer(CONFIG, checkpoint, scene, str(tmp_path / 'one'), save=['labels'], tta=tta, cfg_options=options)
    infer(str(tmp_path / 'pushed'), None, scene, str(tmp_path / 'other'), save=['labels'], tta=tta)
    one, other = labels(tmp_path / 'one'), labels(tmp_path / 'other')
    assert len(one) == 1 and len(np.unique(one)) > (1 if options == BINARY else 3)
    assert np.array_equal(one, other)


def test_labels_from_the_hub_equal_those_of_the_checkpoint(place, hub, tmp_path, monkeypatch, capsys):
    checkpoint = str(place / 'random.pth')
    assert main('push', [CONFIG, checkpoint, NAME, '--private', '--message', 'First']) == 0
    repository = hub.repositories['me/streets']
    assert repository.private and repository.messages == ['First']
    [files] = repository.commits.values()
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert f'{hub.url}/me/streets/commit/{repository.refs["main"]}' in capsys.readouterr().out

    assert main('infer', [NAME, *scenes(place), '--out-dir', str(tmp_path / 'hub')]) == 0
    infer(CONFIG, checkpoint, scenes(place), str(tmp_path / 'own'))
    assert files_of(tmp_path / 'hub') == files_of(tmp_path / 'own')
    assert len(files_of(tmp_path / 'hub')) == 4 and len(hub.downloads(WEIGHTS)) == 1

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    infer(NAME, None, scenes(place), str(tmp_path / 'offline'))
    assert files_of(tmp_path / 'offline') == files_of(tmp_path / 'own')
    with pytest.raises(UserError, match=f'{NAME} cannot be written: HF_HUB_OFFLINE is set'):
        push(CONFIG, checkpoint, NAME)


def test_a_second_push_is_a_second_commit_and_revisions_are_kept_apart(place, hub, tmp_path):
    one, other = str(place / 'random.pth'), saved(tmp_path / 'other.pth', {})
    state = torch.load(other)
    state['state_dict']['decode_head.conv_seg.weight'].neg_()
    torch.save(state, other)
    for checkpoint in (one, other):
        push(CONFIG, checkpoint, NAME)
    repository = hub.repositories['me/streets']
    first, second = repository.commits
    repository.refs['v1'] = first
    weights = {name: read_checkpoint(f'{NAME}{name}') for name in ('', '@main', '@v1', f'@{first}')}
    key = 'decode_head.conv_seg.weight'
    assert torch.equal(weights['@v1'][key], weights[f'@{first}'][key])
    assert torch.equal(weights[''][key], weights['@main'][key]) and not torch.equal(
        weights[''][key], weights['@v1'][key]
    )
    assert load_model(f'{NAME}@v1', None, {}).checkpoint == f'{NAME}@{first}'
    assert not repository.private


def test_weights_belong_to_the_commit_of_their_config(stored, place):
    repository = stored.repositories['me/streets']
    first = repository.refs['main']
    found = load_model(NAME, None, {})
    repository.commit({WEIGHTS: b'newer, of another shape'})
    assert found.checkpoint == f'{NAME}@{first}'
    before = len(stored.requests)
    assert len(read_checkpoint(found.checkpoint)) > 100 and len(stored.requests) == before, 'a commit never changes'


@pytest.mark.parametrize('kind', ['timm', 'mmengine', 'parallel'])
def test_averaged_weights_are_pushed(place, tmp_path, kind):
    state = torch.load(place / 'random.pth')['state_dict']
    key = 'decode_head.conv_seg.bias'
    averaged = {**state, key: state[key] + 1}
    if kind == 'mmengine':
        contents = saved_by_ema_hook()
        assert torch.equal(state_tensors(contents)['0.weight'], contents['averaged'])
        return
    contents = dict(state_dict=state, state_dict_ema=averaged)
    if kind == 'parallel':
        contents = dict(state_dict={f'module.{name}': tensor for name, tensor in averaged.items()})
    torch.save(contents, tmp_path / 'f.pth')
    push(CONFIG, str(tmp_path / 'f.pth'), str(tmp_path / 'pushed'))
    assert torch.equal(load_file(tmp_path / 'pushed' / WEIGHTS)[key], averaged[key])


def saved_by_ema_hook() -> dict:
    """A checkpoint as mmengine's EMAHook changes it, with the averaged weight beside."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    runner = type('Runner', (), dict(model=model, iter=0, epoch=0))()
    hook = EMAHook(momentum=0.5)
    hook.before_run(runner)
    with torch.no_grad():
        model[0].weight.add_(1)
    for runner.iter in range(2):
        hook.after_train_iter(runner, runner.iter)
        model[0].weight.data.add_(1)
    contents = dict(state_dict=model.state_dict())
    averaged = hook.ema_model.module[0].weight.clone()
    assert not torch.equal(averaged, model[0].weight)
    hook.before_save_checkpoint(runner, contents)
    return contents | dict(averaged=averaged)


def test_weights_on_the_hub_are_accepted_wherever_a_checkpoint_is(stored, place, tmp_path):
    expected = torch.load(place / 'random.pth')['state_dict']
    infer(CONFIG, NAME, scenes(place)[:1], str(tmp_path), save=['labels'])
    cfg = load_config(CONFIG, dict(load_from=NAME))
    _find_start(cfg, None)
    for state in (CheckpointLoader.load_checkpoint(cfg.load_from), read_checkpoint(NAME)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    backbone = VOLO('tiny', img_size=(96, 192), init_cfg=dict(type='Pretrained', checkpoint=NAME))
    backbone.init_weights()
    assert torch.equal(backbone.pos_embed, expected['backbone.pos_embed'])


def test_a_model_is_measured_on_the_test_set_of_its_config_or_of_another(stored, place, pushed, tmp_path, no_pages):
    options = dict(INLINE, data_root=str(place / 'toy'))
    runs = [(NAME, None), (CONFIG, str(pushed)), (CONFIG, str(place / 'random.pth'))]
    scores = []
    for i, (model, checkpoint) in enumerate(runs):
        work = dict(work_dir=str(tmp_path / str(i)), cfg_options=options)
        scores.append(measure(model, checkpoint, **work))
    assert scores == scores[:1] * len(runs) and scores[0]['mIoU'] > 0
    record = json.loads((tmp_path / '0/metrics.json').read_text())
    assert record['checkpoint'] == f'{NAME}@{stored.repositories["me/streets"].refs["main"]}'


@pytest.mark.parametrize(
    ('keys', 'value', 'sentence'),
    [
        (['name'], 'mine', 'brings no test set, and neither does mmseg_volo for mine; give a config that has one'),
        (['name'], 'volo_tiny_camvid', 'predicts other classes than the test set of volo_tiny_camvid has'),
    ],
)
def test_a_model_without_a_test_set_of_its_classes_is_one_sentence(pushed, tmp_path, keys, value, sentence):
    content = json.loads((pushed / CONFIG_JSON).read_text()) | {keys[0]: value}
    (tmp_path / CONFIG_JSON).write_text(json.dumps(content))
    (tmp_path / WEIGHTS).symlink_to(pushed / WEIGHTS)
    with pytest.raises(UserError, match=sentence):
        measure(str(tmp_path), work_dir=str(tmp_path / 'work'))


# config.json


@pytest.mark.parametrize('name', [name for name, path in shipped_configs().items() if path.parent.name != 'pretrain'])
def test_every_shipped_config_is_plain_data_and_is_read_as_it_was(name):
    cfg = load_config(name, {})
    classes = [str(i) for i in range(cfg.model.decode_head.num_classes)]
    meta = dict(classes=classes, palette=[[0, 0, 0]] * len(classes))
    if shipped_configs()[name].parent.name == 'baselines':
        with pytest.raises(UserError, match=rf'{name} cannot be pushed: model.backbone.type is .*Swin|TIMM'):
            plain_config(cfg, name, meta)
        return
    text = json.dumps(plain_config(cfg, name, meta), allow_nan=False)
    found = config_of(parsed_config(text.encode(), 'text'))
    for key in ('model', 'test_pipeline', 'tta_pipeline', 'tta_model'):
        assert repr(found[key]) == repr(without_training(cfg[key]))  # also which are tuples, and the order of keys


def without_training(value: object) -> object:
    if isinstance(value, dict):
        return type(value)({key: without_training(item) for key, item in value.items() if key not in LEFT_OUT})
    return type(value)(map(without_training, value)) if isinstance(value, list | tuple) else value


class MyHead(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (
            {'model.decode_head.type': MyHead},
            "model.decode_head.type is 'test_hub.MyHead', which is not among the types",
        ),
        ({'model.neck.act_cfg.type': 'os.system'}, "model.neck.act_cfg.type is 'os.system', which is not among"),
        (
            {'model.neck.conv_cfg': len},
            'model.neck.conv_cfg is of type builtin_function_or_method, and',
        ),
        (
            {'test_dataloader.dataset.pipeline.0.color_type': '/a'},
            "test_pipeline.color_type is '/a', which is not among",
        ),
        ({'model.decode_head.dropout_ratio': float('inf')}, 'model.decode_head.dropout_ratio is inf, too large'),
    ],
    ids=str,
)
def test_what_is_no_plain_data_cannot_be_pushed(options, sentence):
    cfg = Config(load_config(CONFIG, {}).to_dict())
    for key, value in options.items():
        part = cfg
        *keys, last = key.split('.')
        for name in keys:
            part = part[int(name) if name.isdecimal() else name]
        part[last] = value
    with pytest.raises(UserError, match=re.escape(f'mine cannot be pushed: {sentence}')):
        plain_config(cfg, 'mine', DATASETS.get('CityscapesDataset').METAINFO)


def test_the_strings_of_mmsegs_registries_are_read_as_the_same_classes():
    own = load_config(CONFIG, {})
    cfg = Config(own.to_dict())
    cfg.model.type, cfg.model.backbone.type, cfg.model.decode_head.type = 'SlidingSegmentor', 'VOLO', 'mmseg.UPerHead'
    content = plain_config(cfg, 'mine', DATASETS.get('CityscapesDataset').METAINFO)
    model = config_of(content).model
    assert (model.type, model.backbone.type) == (own.model.type, own.model.backbone.type)
    assert content['model']['decode_head']['type'] == model.decode_head.type == 'UPerHead'


@pytest.mark.parametrize('name', HARMFUL_MODELS)
def test_a_harmful_model_is_refused_and_nothing_of_it_runs(tmp_path, name):
    (tmp_path / 'file').mkdir()
    ran = tmp_path / 'ran'
    path = HARMFUL_MODELS[name](tmp_path / 'file', ran)
    result, sentence = hostile_files.outcome(path, 'folder')
    assert result == 'refused' and str(path) in sentence and not ran.exists(), sentence


def test_without_our_checks_mmengine_would_run_such_a_model(tmp_path):
    ran = tmp_path / 'ran'
    init_default_scope('mmseg')
    with pytest.raises(TypeError):
        MODELS.build(dict(type='os.system', command=f'touch {ran}', more=1))
    MODELS.build(hostile_files.touching(ran))
    assert ran.exists()
    ran.unlink()
    MODELS.build(dict(type='CrossEntropyLoss', class_weight=hostile_files.pickled_weight(ran)))
    assert ran.exists()


@pytest.mark.parametrize('name', ODD_MODELS)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_an_odd_model_is_read_or_refused_with_a_sentence(tmp_path, name):
    (tmp_path / 'file').mkdir()
    path = ODD_MODELS[name](tmp_path / 'file', tmp_path / 'ran')
    result, sentence = hostile_files.outcome(path, 'folder')
    accepted = {'no pipeline': 'loaded as saved', 'tensor of integers': 'loaded, other values'}
    assert result == accepted.get(name, 'refused'), sentence


def test_models_with_changed_values_or_bytes_are_read_or_refused(tmp_path):
    stream = hostile_files.changed_models(hostile_files.random.Random(3))
    for i in range(30):
        (tmp_path / str(i)).mkdir()
        result, sentence = hostile_files.outcome(next(stream)(tmp_path / str(i), tmp_path / 'ran'), 'folder')
        assert result in hostile_files.OUTCOMES[:3], sentence


# The hub's answers


@pytest.mark.parametrize(
    ('source', 'sentence'),
    [
        (
            'hf://me/street',
            'the hub has no model me/street, or it is private; check the spelling, and for private models',
        ),
        ('hf://me/streets@v9', "it has no revision 'v9'; its page on the hub lists branches"),
        ('hf://me/streets@' + 'a' * 40, "it has no revision 'a"),
        ('hf://me/empty', 'hf://me/empty has no config.json that mmseg-volo push wrote; if its weights fit a config'),
        ('hf://me/pickles', 'hf://me/pickles has no config.json that mmseg-volo push wrote'),
        ('hf://streets', 'a model on the hub is hf://owner/name or hf://owner/name@revision, got hf://streets'),
        ('hf://me/streets/x', 'a model on the hub is hf://owner/name or'),
        ('hf://me/streets@../x', 'a model on the hub is hf://owner/name or'),
        ('hf://me/streets@', 'a model on the hub is hf://owner/name or'),
        ('hf://me/a--b', 'the hub does not allow such names'),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(stored, place, tmp_path, capsys, source, sentence):
    stored.repositories['me/empty'] = Repository()
    stored.repositories['me/empty'].commit({'README.md': b''})
    stored.repositories['me/pickles'] = Repository()
    stored.repositories['me/pickles'].commit({CONFIG_JSON: b'{"architecture": "x"}', 'pytorch_model.bin': b'\x80'})
    with pytest.raises(SystemExit) as end:
        main('infer', [source, *scenes(place), '--out-dir', str(tmp_path / 'out')])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith('error: ') and sentence in line
    assert not stored.downloads('pytorch_model.bin')


def test_a_private_model_needs_a_token(stored, place, tmp_path, monkeypatch):
    stored.repositories['me/streets'].private = True
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(
        UserError, match='or it is private; .* log in .hf auth login, or the environment variable HF_TOKEN'
    ):
        load_model(NAME, None, {})
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    load_model(NAME, None, {})


@pytest.mark.parametrize(
    ('status', 'sentence'), [(403, 'the hub answers 403; your token does not allow it'), (500, 'cannot be reached')]
)
def test_a_hub_that_refuses_or_fails_is_one_sentence(stored, status, sentence):
    stored.answers['resolve'] = status
    with pytest.raises(UserError, match=sentence):
        load_model(NAME, None, {})


def test_without_a_network_the_cache_is_used_and_its_lack_is_said_at_once(stored, monkeypatch):
    load_model(NAME, None, {})
    nowhere = 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', nowhere)
    start = time.perf_counter()
    load_model(NAME, None, {})
    with pytest.raises(UserError, match=r'config.json is not in the cache, and the hub cannot be reached \(.*refused'):
        load_model('hf://me/other', None, {})
    assert time.perf_counter() - start < 5, 'it must not retry'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='model.safetensors is not in the cache, and HF_HUB_OFFLINE is set'):
        read_checkpoint('hf://me/other')


def test_an_interrupted_download_goes_on_where_it_ended(stored, monkeypatch):
    whole = stored.repositories['me/streets'].commits[stored.repositories['me/streets'].refs['main']][WEIGHTS]
    stored.dropped_after = [1000, 2000]
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 500)  # only whole blocks are kept
    assert model_file(NAME, WEIGHTS).read_bytes() == whole
    assert [headers.get('range') for headers in stored.downloads(WEIGHTS)] == [None, 'bytes=1000-', 'bytes=3000-']


def test_a_download_that_fails_leaves_nothing_and_the_next_one_succeeds(stored, tmp_path):
    whole = stored.repositories['me/streets'].commits[stored.repositories['me/streets'].refs['main']][WEIGHTS]
    stored.dropped_after = [1000, *[0] * 6]
    with pytest.raises(UserError, match=f'{NAME}: model.safetensors cannot be read: '):
        model_file(NAME, WEIGHTS)
    cached = (tmp_path / 'cache/models--me--streets').rglob('*')
    assert [path.name for path in cached if path.is_file()] == ['main']  # the commit's hash
    assert model_file(NAME, WEIGHTS).read_bytes() == whole


def test_a_download_killed_half_way_leaves_nothing_that_is_read(stored, tmp_path):
    whole = stored.repositories['me/streets'].commits[stored.repositories['me/streets'].refs['main']][WEIGHTS]
    stored.dropped_after = [len(whole) // 2]
    code = 'import sys; from huggingface_hub import hf_hub_download; hf_hub_download("me/streets", "model.safetensors")'
    cache = dict(HF_ENDPOINT=stored.url, HF_HUB_CACHE=str(tmp_path / 'cache'), HF_HUB_DISABLE_XET='1')
    child = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, **cache})
    deadline = time.monotonic() + 60
    while not list((tmp_path / 'cache').rglob('*.incomplete')) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not list((tmp_path / 'cache').rglob(WEIGHTS)) and list((tmp_path / 'cache').rglob('*.incomplete'))
    assert model_file(NAME, WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize('name', [CONFIG_JSON, WEIGHTS])
def test_a_file_that_is_too_large_is_not_downloaded(stored, name):
    stored.sizes[name] = LARGEST[name] + 1
    with pytest.raises(UserError, match=f'{NAME}.* is refused: its {name} has {LARGEST[name] + 1} bytes, more than'):
        load_model(NAME, None, {})
    assert not stored.downloads(name)


def test_only_safetensors_and_json_are_ever_asked_for(stored):
    load_model(NAME, None, {})
    VOLO.from_pretrained(NAME)
    asked = {path.rpartition('/')[2] for method, path, _ in stored.requests if '/resolve/' in path}
    assert asked == {CONFIG_JSON, WEIGHTS}


# Pushing


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['hf://me/streets@v1'], 'push makes a new commit on the main branch, so hf://me/streets@v1 must not name a'),
        (['hf://streets'], 'a model on the hub is hf://owner/name'),
        (['hf://others/streets'], 'hf://others/streets: the model cannot be uploaded: the hub answers 403; your token'),
        (['FULL'], 'FULL is not empty: choose a new folder'),
        (['FULL/file'], 'FULL/file is not a folder'),
        (['FULL/file/x'], 'cannot write to '),
        ([NAME, '--license', 'My Own'], "--license must be one of the hub's names, such as apache-2.0"),
        ([NAME, '--metrics', 'FULL/file'], 'is no metrics.json of mmseg-volo test (JSONDecodeError'),
        ([NAME, '--metrics', 'nowhere.json'], 'nowhere.json is no metrics.json of mmseg-volo test (FileNotFoundError'),
        ([NAME, '--metrics', 'FULL/other.json'], 'other.json belongs to another checkpoint: other.pth'),
        ([NAME, '--cfg-options', 'model.backbone.arch=d1'], 'random.pth does not fit the model of this config: '),
    ],
    ids=str,
)
def test_a_push_that_cannot_succeed_is_one_sentence(place, hub, tmp_path, capsys, arguments, sentence):
    (tmp_path / 'FULL').mkdir()
    (tmp_path / 'FULL/file').write_text('x')
    record = dict(checkpoint='other.pth', checkpoint_sha256='0', metrics={}, classes=[{}], versions={}, images=1)
    (tmp_path / 'FULL/other.json').write_text(json.dumps(record | dict(tta=False, device='cpu')))
    words = [word.replace('FULL', str(tmp_path / 'FULL')) for word in arguments]
    before = files_of(tmp_path)
    with pytest.raises(SystemExit) as end:
        main('push', [CONFIG, str(place / 'random.pth'), *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and sentence in line.replace(str(tmp_path / 'FULL'), 'FULL')
    assert files_of(tmp_path) == before and not hub.repositories


def test_a_push_without_a_token_or_with_a_wrong_one_is_one_sentence(place, hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(UserError, match='the hub answers 401; your token does not allow it'):
        push(CONFIG, str(place / 'random.pth'), NAME)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(
        UserError, match='cannot be written without a token: log in with hf auth login, or set HF_TOKEN'
    ):
        push(CONFIG, str(place / 'random.pth'), NAME)


def test_weights_that_are_not_finite_are_not_pushed(place, tmp_path):
    contents = torch.load(place / 'random.pth')
    contents['state_dict']['backbone.pos_embed'][0, 0, 0, 0] = torch.nan
    torch.save(contents, tmp_path / 'nan.pth')
    with pytest.raises(
        UserError, match=r'nan.pth is refused: 1 of its tensors contain NaN or infinity \(backbone.pos_em'
    ):
        push(CONFIG, str(tmp_path / 'nan.pth'), str(tmp_path / 'pushed'))
    assert [path.name for path in tmp_path.iterdir()] == ['nan.pth']


def test_the_card_has_metadata_and_says_what_was_not_measured(pushed):
    card = ModelCard.load(pushed / 'README.md')
    assert card.data.to_dict() == dict(
        datasets=['toy_streets'],
        library_name='mmseg_volo',
        license='unknown',
        pipeline_tag='image-segmentation',
        tags=['semantic-segmentation', 'mmsegmentation', 'volo'],
    )
    for text in (
        'Not measured.',
        f'mmseg-volo infer {pushed} street.jpg',
        'VOLO tiny with UPerHead',
        '| 13 | car | #00008e |',
    ):
        assert text in card.text
    assert 'their author has not chosen a licence' in card.text and 'names no weights from which' in card.text
    assert (pushed / WEIGHTS).stat().st_mode == (pushed / CONFIG_JSON).stat().st_mode


def test_the_card_holds_the_measured_table_and_the_origin_of_the_weights(place, tmp_path, no_pages):
    (tmp_path / 'work').mkdir()
    checkpoint = saved(tmp_path / 'work/best.pth', {})
    scores = measure(
        CONFIG, checkpoint, work_dir=str(tmp_path / 'work'), cfg_options=dict(INLINE, data_root=str(place / 'toy'))
    )
    origin = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint='timm://volo_d1_384.sail_in1k')}
    push(CONFIG, checkpoint, str(tmp_path / 'pushed'), license='cc-by-4.0', cfg_options=origin)
    card = ModelCard.load(tmp_path / 'pushed/README.md')
    [result] = card.data.eval_results
    assert (card.data.license, result.metric_value) == ('cc-by-4.0', round(scores['mIoU'], 2))
    low, high = json.loads((tmp_path / 'work/metrics.json').read_text())['intervals']['mIoU']
    assert f'| mIoU | {scores["mIoU"]:.2f} | {low:.2f} to {high:.2f} |' in card.text
    assert f'on 2 images, cpu, torch {torch.__version__}' in card.text and '| road | ' in card.text
    assert '`timm://volo_d1_384.sail_in1k`' in card.text and 'contact with the authors' in card.text
    assert 'init_cfg' not in (tmp_path / 'pushed' / CONFIG_JSON).read_text()

    torch.save(torch.load(checkpoint) | dict(more=1), checkpoint)  # metrics.json is now another checkpoint's
    push(CONFIG, checkpoint, str(tmp_path / 'again'))
    assert 'Not measured.' in (tmp_path / 'again/README.md').read_text()


def test_names_of_classes_cannot_break_the_card(place, tmp_path):
    contents = torch.load(place / 'random.pth')
    classes = ('a|b', '<script>', *map(str, range(17)))
    contents['meta']['dataset_meta'] = contents['meta']['dataset_meta'] | dict(classes=classes)
    torch.save(contents, tmp_path / 'f.pth')
    push(CONFIG, str(tmp_path / 'f.pth'), str(tmp_path / 'pushed'))
    text = (tmp_path / 'pushed/README.md').read_text()
    assert '| 0 | a&#124;b |' in text and '&lt;script&gt;' in text and '<script>' not in text


# Backbones


BACKBONES = [
    (VOLO, dict(arch='tiny', img_size=(96, 192))),
    (VOLO, dict(arch='tiny', img_size=64, in_channels=5)),
    (CoAtNet, dict(arch='tiny', img_size=64)),
    (CoAtNet, dict(arch='0', img_size=(64, 96), in_channels=1)),
    (HVT, dict(arch='tiny', img_size=(64, 96), patch_size=4)),
    (HVT, dict(arch='ti1', pooling='1d')),
]


@pytest.mark.parametrize(('kind', 'arguments'), BACKBONES, ids=str)
def test_a_backbone_is_told_by_its_tensors(kind, arguments, tmp_path):
    torch.manual_seed(0)
    own = kind(**arguments)
    torch.save(
        dict(state_dict={f'backbone.{key}': value for key, value in own.state_dict().items()}), tmp_path / 'f.pth'
    )
    found = kind.from_pretrained(str(tmp_path / 'f.pth'))
    assert type(found) is kind and not found.training and found.arch == arguments['arch']
    assert found.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(tensor, own.state_dict()[key]) for key, tensor in found.state_dict().items())


def test_a_backbone_is_built_with_the_arguments_in_config_json(stored, pushed, caplog):
    expected = load_file(pushed / WEIGHTS)
    for source in (NAME, str(pushed)):
        found = VOLO.from_pretrained(source, drop_path_rate=0.3)
        assert all(torch.equal(tensor, expected[f'backbone.{key}']) for key, tensor in found.state_dict().items())
        rates = [module.drop_prob for module in found.modules() if hasattr(module, 'drop_prob')]
        assert max(rates) == 0.3 and (found.arch, tuple(found.pos_embed.shape[1:3])) == ('tiny', (6, 12))
    assert VOLO.from_pretrained(NAME, img_size=64).pos_embed.shape[1:3] == (4, 4)


def test_a_model_of_timms_on_the_hub_is_a_backbone(hub, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model('volo_d1_224', num_classes=10)
    save_file(theirs.state_dict(), tmp_path / 'f.safetensors')
    hub.repositories['timm/volo_d1_224.sail_in1k'] = Repository()
    files = {WEIGHTS: (tmp_path / 'f.safetensors').read_bytes(), CONFIG_JSON: b'{"architecture": "volo_d1_224"}'}
    hub.repositories['timm/volo_d1_224.sail_in1k'].commit(files)
    for source in ('timm://volo_d1_224', 'hf://timm/volo_d1_224.sail_in1k'):
        found = VOLO.from_pretrained(source, out_indices=(0, 1))
        assert found.arch == 'd1' and found.pos_embed.shape[1:3] == (14, 14) and len(found.network) == 3
        assert torch.equal(found.network[2][3].mlp.fc2.weight, theirs.network[2][3].mlp.fc2.weight)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda pushed: CoAtNet.from_pretrained(str(pushed)), 'does not contain a CoAtNet, but a mmseg_volo.VOLO'),
        (
            lambda pushed: HVT.from_pretrained(str(pushed / WEIGHTS)),
            'does not tell its architecture; if it is a HVT',
        ),
        (
            lambda pushed: VOLO.from_pretrained(str(pushed), arch='d1'),
            'does not fit VOLO arch=.d1., it is VOLO arch=.tiny.',
        ),
        (lambda pushed: VOLO.from_pretrained(str(pushed), speed=3), 'describes no VOLO: TypeError: .*speed'),
        (lambda pushed: VOLO.from_pretrained(str(pushed / 'x')), 'checkpoint not found'),
        (lambda pushed: VOLO.from_pretrained(str(pushed.parent)), 'checkpoint not found'),
    ],
    ids=['another backbone', 'unknown', 'another arch', 'strange argument', 'no file', 'no model'],
)
def test_weights_that_are_no_such_backbone_are_one_sentence(pushed, change, sentence):
    with pytest.raises(UserError, match=sentence):
        change(pushed)


# Words of the command line


@pytest.mark.parametrize(
    'words',
    [['C', 'f.pth', 'a', 'b', '--amp'], ['--amp', 'C', 'f.pth', 'a', 'b'], ['C', '--amp', 'f.pth', 'a', 'b']]
    + [['C', 'f.pth', '--amp', 'a', 'b'], ['C', 'f.pth', 'a', '--amp', 'b']],
    ids=' '.join,
)
def test_the_words_of_infer_may_stand_around_options(words):
    args = parser().parse_args(['infer', *words])
    assert args.amp and (args.config, args.checkpoint, args.images) == ('C', 'f.pth', ['a', 'b'])
    args = parser().parse_args(['test', 'C', '--tta', 'f.pth'])
    assert args.tta and (args.config, args.checkpoint) == ('C', 'f.pth')


@pytest.mark.parametrize(
    ('model', 'words', 'expected'),
    [
        (NAME, ['a.png', 'b'], (None, ['a.png', 'b'])),
        (NAME, ['photos'], (None, ['photos'])),
        (NAME, ['https://x.org/f', 'b'], ('https://x.org/f', ['b'])),
        (NAME, ['hf://you/other', 'b'], ('hf://you/other', ['b'])),
        *((NAME, [f'f.{suffix}', 'b'], (f'f.{suffix}', ['b'])) for suffix in ('pth', 'pth.tar', 'pt', 'ckpt', 'bin')),
        *((NAME, [f'f.{suffix}', 'b'], (f'f.{suffix}', ['b'])) for suffix in ('safetensors', 'onnx', 'pt2', 'PTH')),
        ('volo_d1_camvid', ['f.pth', 'a.png'], ('f.pth', ['a.png'])),
        ('volo_d1_camvid', ['weights', 'a.png'], ('weights', ['a.png'])),  # as before there were models with weights
    ],
    ids=str,
)
def test_the_second_word_is_a_checkpoint_if_it_looks_like_one_or_must_be_one(model, words, expected):
    assert split_words(model, words) == expected


@pytest.mark.parametrize(
    ('model', 'words', 'sentence'),
    [
        ('volo_d1_camvid', ['a.png'], 'volo_d1_camvid has no weights of its own: give a checkpoint before a.png'),
        (
            'volo_d1_camvi',
            ['a.png'],
            'config not found: volo_d1_camvi; did you mean volo_d1_camvid',
        ),
        ('f.pth', ['a.png'], 'f.pth is a checkpoint: give the config with which it was trained before it'),
        ('volo_d1_camvid', ['f.pth'], 'no images, videos, folders or patterns were given'),
        (NAME, [], 'no images, videos, folders or patterns were given'),
    ],
)
def test_a_missing_word_is_one_sentence(model, words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main('infer', [model, *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f'error: {sentence}')


def test_a_config_without_weights_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match='volo_d1_camvid has no weights of its own: give a checkpoint after it'):
        measure('volo_d1_camvid', work_dir=str(tmp_path))


# Weights that come with the package


def test_shipped_weights_are_used_where_no_checkpoint_is_given(place, pushed, tmp_path, monkeypatch, no_pages):
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setattr(shipped, 'FOLDER', folder)
    content = (pushed / WEIGHTS).read_bytes()
    (folder / f'{CONFIG}.safetensors').write_bytes(content)
    (folder / 'index.json').write_text(json.dumps({CONFIG: dict(sha256=hashlib.sha256(content).hexdigest())}))

    assert main('infer', [CONFIG, *scenes(place), '--out-dir', str(tmp_path / 'shipped')]) == 0
    infer(CONFIG, str(place / 'random.pth'), scenes(place), str(tmp_path / 'own'))
    assert files_of(tmp_path / 'shipped') == files_of(tmp_path / 'own')
    assert split_words('volo_d1_camvid', ['weights', 'a']) == ('weights', ['a'])
    scores = measure(CONFIG, work_dir=str(tmp_path / 'work'), cfg_options=dict(INLINE, data_root=str(place / 'toy')))
    assert scores['mIoU'] > 0

    (folder / f'{CONFIG}.safetensors').write_bytes(content[:-1])
    with pytest.raises(UserError, match='streets.safetensors, which comes with mmseg-volo, is missing or damaged'):
        infer(CONFIG, None, scenes(place), str(tmp_path / 'out'))


def test_the_index_of_shipped_weights_names_files_that_exist():
    index = json.loads((ROOT / 'mmseg_volo/weights/index.json').read_text())
    assert {path.stem for path in shipped.FOLDER.glob('*.safetensors')} == set(index) <= set(shipped_configs())
    assert all(shipped.shipped_weights(name) for name in index)


def test_the_shipped_weights_segment_real_pictures(camvid, tmp_path, capsys):
    options = {key: str(camvid) for key in ('data_root', 'test_dataloader.dataset.data_root')}
    options |= {'test_dataloader.dataset.indices': 24, **INLINE}
    scores = measure('volo_tiny_camvid', work_dir=str(tmp_path), cfg_options=options)
    assert scores['aAcc'] > 70 and scores['mIoU'] > 30
    weights = load_file(shipped.shipped_weights('volo_tiny_camvid'))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16, torch.int64}
