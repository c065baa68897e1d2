import argparse
import builtins
import functools
import hashlib
import http.server
import importlib.util
import logging
import os
import pickle
import re
import socket
import threading
import time

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.model.weight_init import PretrainedInit
from mmengine.optim import OptimWrapper, PolyLR
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from parity import assert_close
from safetensors.torch import save_file
from torch import nn

from mmseg_volo import ARCHITECTURES, VOLO
from mmseg_volo.checkpoints.download import _expected_sha256
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.config import load_config
from mmseg_volo.errors import UserError
from mmseg_volo.models.pretrained import PretrainedFormat, load_pretrained, load_segmentor
from mmseg_volo.models.volo import PRETRAINED, resize_pos_embed

GRID = 4  # of a stored 64 x 64 position embedding
CLASSIFIER_KEYS = {
    'head.weight': (10, 128),
    'head.bias': (10,),
    'aux_head.weight': (10, 128),
    'aux_head.bias': (10,),
    'cls_token': (1, 1, 128),
    'post_network.0.norm1.weight': (128,),
    'post_network.0.attn.kv.weight': (256, 128),
    'norm.weight': (128,),
    'norm.bias': (128,),
}


def randomised(model: nn.Module) -> nn.Module:
    """``model`` with random values in every tensor, including counters and running statistics."""
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 2 if tensor.is_floating_point() else torch.full_like(tensor, 7))
    return model


def backbone_state(**kwargs) -> dict:
    return randomised(VOLO('tiny', **{'img_size': 64, **kwargs})).state_dict()


def imagenet_state() -> dict:
    """Contents of an ImageNet checkpoint of VOLO-tiny: a classifier, but no output norms."""
    state = {key: tensor for key, tensor in backbone_state().items() if not key.startswith('norm')}
    return state | {key: torch.rand(shape) for key, shape in CLASSIFIER_KEYS.items()}


def volo(checkpoint, **kwargs) -> VOLO:
    return VOLO('tiny', **{'img_size': 64, **kwargs}, init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)))


def loaded(checkpoint, **kwargs) -> VOLO:
    model = volo(checkpoint, **kwargs)
    model.init_weights()
    return model


def saved(contents, path, **kwargs):
    torch.save(contents, path, **kwargs)
    return path


def assert_holds(model: nn.Module, state: dict, but: tuple[str, ...] = ()) -> None:
    """Assert that ``model`` holds the tensors of ``state``, except missing output norms and the keys in ``but``."""
    compared = 0
    for key, tensor in model.state_dict().items():
        if key in but or (key.startswith('norm') and key not in state):
            continue
        assert torch.equal(tensor, state[key]), key
        compared += 1
    assert compared > 20


def segmentor(classes: int = 4, **backbone) -> nn.Module:
    init_default_scope('mmseg')
    return MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(type='VOLO', arch='tiny', img_size=64, **backbone),
            decode_head=dict(
                type='UPerHead',
                in_channels=[64, 128, 128, 128],
                in_index=[0, 1, 2, 3],
                channels=8,
                num_classes=classes,
                norm_cfg=dict(type='BN'),
                align_corners=False,
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        )
    )


def one_line(error) -> str:
    """The message of a ``UserError``, which must be one line without advice to run code."""
    sentence = str(error.value)
    assert sentence and '\n' not in sentence and 'set to `False`' not in sentence
    return sentence


@pytest.fixture
def log():
    """Lines that mmengine's logger receives during a test."""
    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# Forms of a checkpoint


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'state_dict_ema', 'model'])
@pytest.mark.parametrize('suffix', ['.pth.tar', '.pth', '.bin'])
def test_every_wrapping_of_an_imagenet_checkpoint_loads(tmp_path, suffix, wrapper, prefix):
    state = imagenet_state()
    contents = {prefix + key: tensor for key, tensor in state.items()}
    path = saved(contents if wrapper is None else {'epoch': 300, wrapper: contents}, tmp_path / f'volo{suffix}')
    assert_holds(loaded(path), state)


def test_safetensors_load(tmp_path):
    state = imagenet_state()
    save_file(state, tmp_path / 'model.safetensors')
    assert_holds(loaded(tmp_path / 'model.safetensors'), state)


def test_the_format_before_torch_1_6_loads(tmp_path):
    state = imagenet_state()
    path = saved({'state_dict': state}, tmp_path / 'old.pth.tar', _use_new_zipfile_serialization=False)
    assert not path.read_bytes().startswith(b'PK')
    assert_holds(loaded(path), state)


def test_a_training_checkpoint_of_timm_loads_with_its_averaged_weights(tmp_path):
    raw, averaged = imagenet_state(), imagenet_state()
    optimizer = torch.optim.AdamW(VOLO('tiny').parameters())
    contents = {
        'epoch': 3,
        'arch': 'volo',
        'state_dict': raw,
        'state_dict_ema': {f'module.{key}': tensor for key, tensor in averaged.items()},
        'optimizer': optimizer.state_dict(),
        'args': argparse.Namespace(lr=1e-3, model='volo', mean=(0.5, 0.5, 0.5)),
        'metric': np.float64(76.5),
    }
    path = saved(contents, tmp_path / 'last.pth.tar')
    assert read_checkpoint(path)['args'].model == 'volo'
    assert_holds(loaded(path), averaged)


def training_checkpoint(model: nn.Module) -> dict:
    """What mmengine's CheckpointHook saves: weights, optimizer, schedulers, message hub and meta."""
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    hub = MessageHub.get_instance(f'weights-{time.monotonic_ns()}')
    for i in range(3):
        hub.update_scalar('train/loss', 1.5 - i)
        hub.update_scalar('train/lr', np.float32(0.25))
    hub.update_info_dict(dict(iter=3, seed=np.int64(5), loop_stage='train'))
    scheduler = PolyLR(optimizer, eta_min=0, power=0.9, begin=0, end=10, by_epoch=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # fills the optimizer's state
    return dict(
        meta=dict(iter=3, seed=5, cfg='model = dict()', dataset_meta=dict(classes=('a', 'b'), palette=[[1, 2, 3]] * 2)),
        state_dict=model.state_dict(),
        message_hub=hub.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[scheduler.state_dict()],
    )


def test_a_training_checkpoint_of_mmengine_is_read_whole(tmp_path):
    contents = training_checkpoint(randomised(VOLO('tiny')))
    path = saved(contents, tmp_path / 'iter_3.pth')
    unusual = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {'builtins.getattr', 'mmengine.logging.history_buffer.HistoryBuffer'} <= set(unusual)
    read = read_checkpoint(path)
    assert read['meta'] == contents['meta']
    assert read['param_schedulers'] == contents['param_schedulers']
    assert read['message_hub']['runtime_info'] == contents['message_hub']['runtime_info']
    loss = read['message_hub']['log_scalars']['train/loss']
    assert isinstance(loss, HistoryBuffer) and list(loss.data[0]) == [1.5, 0.5, -0.5]
    assert loss.mean() == loss.statistics('mean') == 0.5
    moments, expected = read['optimizer']['state'], contents['optimizer']['state']
    assert moments.keys() == expected.keys() and len(moments) > 20
    assert all(torch.equal(moments[i]['exp_avg'], expected[i]['exp_avg']) for i in moments)


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_checkpoint_of_our_segmentor_gives_its_backbone_with_output_norms(tmp_path, prefix):
    theirs = randomised(segmentor())
    contents = training_checkpoint(theirs)
    contents['state_dict'] = {prefix + key: tensor for key, tensor in contents['state_dict'].items()}
    path = saved(contents, tmp_path / 'iter_3.pth')
    expected = theirs.backbone.state_dict()
    assert 'norm3.weight' in expected
    assert_holds(loaded(path), expected)


def test_a_segmentor_loads_its_backbones_checkpoint(tmp_path):
    state = imagenet_state()
    path = saved(state, tmp_path / 'volo.pth')
    model = segmentor(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    assert_holds(model.backbone, state)


# Fitting a checkpoint to the model


@pytest.mark.parametrize('size', [(96, 160), (32, 32), (64, 128)], ids=str)
def test_position_embedding_is_resized_to_the_configured_grid(tmp_path, size):
    state = imagenet_state()
    model = loaded(saved(state, tmp_path / 'volo.pth'), img_size=size)
    grid = (size[0] // 16, size[1] // 16)
    expected = F.interpolate(state['pos_embed'].permute(0, 3, 1, 2), size=grid, mode='bicubic').permute(0, 2, 3, 1)
    assert tuple(model.pos_embed.shape) == (1, *grid, 128)
    assert torch.equal(model.pos_embed, expected)
    assert_holds(model, state, but=('pos_embed',))


def test_half_precision_files_give_single_precision_models(tmp_path):
    state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in imagenet_state().items()}
    model = loaded(saved(state, tmp_path / 'volo.pth'), img_size=(96, 160), in_channels=1)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert torch.equal(model.network[0][0].attn.v.weight, state['network.0.0.attn.v.weight'].float())


@pytest.mark.parametrize('in_channels', [1, 4])
def test_stem_is_adapted_from_rgb(tmp_path, in_channels):
    state = imagenet_state()
    rgb = state['patch_embed.conv.0.weight']
    model = loaded(saved(state, tmp_path / 'volo.pth'), in_channels=in_channels)
    # A grey image gives the same output as in RGB. More channels repeat R, G and B, scaled so that the sum is kept.
    expected = rgb.sum(1, keepdim=True) if in_channels == 1 else torch.cat([rgb, rgb[:, :1]], 1) * 3 / 4
    assert torch.allclose(model.patch_embed.conv[0].weight, expected)
    assert_holds(model, state, but=('patch_embed.conv.0.weight',))


def test_a_stem_that_is_not_for_rgb_is_not_adapted(tmp_path):
    path = saved(backbone_state(in_channels=4), tmp_path / 'four.pth')
    assert_holds(loaded(path, in_channels=4), torch.load(path))
    with pytest.raises(UserError, match=r'patch_embed\.conv\.0\.weight is \[24, 4, 7, 7\] instead of \[24, 3, 7, 7\]'):
        loaded(path)


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
def test_stages_that_are_not_built_are_left_out(tmp_path, out_indices):
    state = imagenet_state()
    assert_holds(loaded(saved(state, tmp_path / 'volo.pth'), out_indices=out_indices), state)


def test_one_line_says_what_was_loaded_and_what_was_changed(tmp_path, log):
    path = saved(imagenet_state(), tmp_path / 'volo.pth')
    model = loaded(path, img_size=(96, 160), in_channels=1)
    tensors = len(model.state_dict())
    assert log == [
        f'VOLO tiny: {tensors - 8} of {tensors} tensors loaded from {path}; pos_embed resized from 4x4 to 6x10; '
        f'stem adapted from 3 to 1 channels; {len(CLASSIFIER_KEYS)} tensors of the classifier or of unused stages '
        'dropped; 8 tensors of the output norms are new'
    ]


def test_the_line_is_short_where_everything_fits(tmp_path, log):
    state = backbone_state()
    path = saved(state, tmp_path / 'volo.pth')
    loaded(path)
    assert log == [f'VOLO tiny: {len(state)} of {len(state)} tensors loaded from {path}']


def test_the_line_counts_the_tensors_of_unused_stages(tmp_path, log):
    state = imagenet_state()
    model = loaded(saved(state, tmp_path / 'volo.pth'), out_indices=(0,))
    left_out = len(state) - (len(model.state_dict()) - 2)
    assert len(log) == 1 and f'{left_out} tensors of the classifier or of unused stages dropped' in log[0]


@pytest.fixture(scope='module')
def d1_file(tmp_path_factory):
    """timm's VOLO-D1 classifier with random weights and position embedding, as on the Hugging Face hub; 106 MB."""
    torch.manual_seed(0)
    model = timm.create_model('volo_d1_224')
    nn.init.normal_(model.pos_embed)
    path = tmp_path_factory.mktemp('d1') / 'model.safetensors'
    save_file(model.state_dict(), path)
    yield path
    path.unlink()


def test_timms_classifier_gives_timms_features_at_another_size(d1_file):
    state = read_checkpoint(d1_file)
    ours = VOLO('d1', img_size=(256, 512), init_cfg=dict(type='Pretrained', checkpoint=str(d1_file)))
    ours.init_weights()
    for stage in range(4):
        setattr(ours, f'norm{stage}', nn.Identity())
    theirs = timm.create_model('volo_d1_224', img_size=(256, 512))
    resized = F.interpolate(state['pos_embed'].permute(0, 3, 1, 2), size=(16, 32), mode='bicubic').permute(0, 2, 3, 1)
    theirs.load_state_dict(state | {'pos_embed': resized})
    x = torch.randn(1, 3, 256, 512, dtype=torch.float64)
    with torch.inference_mode():
        actual = ours.double().eval()(x)
        expected = theirs.double().eval().forward_intermediates(x, intermediates_only=True)
    assert len(actual) == 4
    for stage, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, what=f'stage {stage}')


# Checkpoints that do not fit


def failing_load(monkeypatch, model: VOLO, state: dict) -> str:
    """The message that refuses ``state``; ``model`` must not change."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    monkeypatch.setattr('mmseg_volo.models.pretrained.read_checkpoint', lambda source: state)
    with pytest.raises(UserError) as error:
        model.init_weights()
    for key, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[key]), f'{key} changed'
    return one_line(error)


def test_missing_tensors_are_listed(monkeypatch):
    state = imagenet_state()
    del state['network.2.1.mlp.fc2.bias'], state['pos_embed']
    assert failing_load(monkeypatch, volo('f.pth'), state) == (
        "f.pth does not fit VOLO arch='tiny': 2 missing (pos_embed, network.2.1.mlp.fc2.bias)"
    )


@pytest.mark.parametrize('out_indices', [(0,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize('key', ['extra.weight', 'header.weight', 'norm4.weight', 'network.5.0.norm1.weight'])
def test_unexpected_tensors_are_listed(monkeypatch, key, out_indices):
    model = volo('f.pth', out_indices=out_indices)
    sentence = failing_load(monkeypatch, model, imagenet_state() | {key: torch.zeros(3)})
    assert sentence == f"f.pth does not fit VOLO arch='tiny': 1 unexpected ({key})"


def test_misshapen_tensors_are_listed_beside_the_others(monkeypatch):
    state = imagenet_state()
    state['network.0.0.norm1.weight'] = torch.zeros(65)
    state['pos_embed'] = torch.zeros(1, 7, 7, 96)
    state['surplus'] = state.pop('patch_embed.proj.bias')
    assert failing_load(monkeypatch, volo('f.pth'), state) == (
        "f.pth does not fit VOLO arch='tiny': 1 missing (patch_embed.proj.bias); 1 unexpected (surplus); 2 of another "
        'shape (pos_embed is [1, 4, 4, 96] instead of [1, 4, 4, 128], '
        'network.0.0.norm1.weight is [65] instead of [64])'
    )


@pytest.mark.parametrize(
    ('key', 'shape'),
    [
        ('patch_embed.conv.0.weight', (3,)),
        ('patch_embed.conv.0.weight', ()),
        ('pos_embed', (1, 16, 128)),
        ('pos_embed', (1, 0, 4, 128)),
    ],
)
def test_tensors_of_a_strange_rank_are_named(monkeypatch, key, shape):
    sentence = failing_load(monkeypatch, volo('f.pth', in_channels=1), imagenet_state() | {key: torch.zeros(shape)})
    assert f'{key} is {list(shape)}' in sentence


def test_a_long_list_is_cut_and_counted(monkeypatch):
    state = imagenet_state()
    extra = {f'extra{i}': torch.zeros(1) for i in range(9)}
    assert '9 unexpected (extra0, extra1, extra2, extra3, extra4 and 4 more)' in failing_load(
        monkeypatch, volo('f.pth'), state | extra
    )


def test_some_output_norms_without_the_others_are_an_error(monkeypatch):
    state = backbone_state()
    del state['norm2.weight']
    assert '1 missing (norm2.weight)' in failing_load(monkeypatch, volo('f.pth'), state)


@pytest.mark.parametrize('contents', [{}, {'epoch': 3}, {'state_dict': {'epoch': 3}}, {0: torch.zeros(1)}], ids=str)
def test_a_file_without_named_tensors_is_an_error(tmp_path, contents):
    with pytest.raises(UserError, match='contains no tensors') as error:
        loaded(saved(contents, tmp_path / 'f.pth'))
    one_line(error)


def shapes_of(arch) -> dict:
    """A state dict with the shapes of ``arch`` that takes no memory."""
    with torch.device('meta'):
        state = VOLO(arch, img_size=224).state_dict()
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items() if not key.startswith('norm')}


@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize('other', sorted(set(ARCHITECTURES) - {'d1'}))
def test_another_architectures_file_says_whose_it_is(monkeypatch, other, out_indices):
    with torch.device('meta'):
        model = VOLO('d1', out_indices=out_indices, init_cfg=dict(type='Pretrained', checkpoint='f.pth'))
    sentence = failing_load(monkeypatch, model, shapes_of(other))
    assert sentence.startswith(f"f.pth does not fit VOLO arch='d1', it is VOLO arch={other!r}: ")


def test_a_file_of_no_known_architecture_is_not_given_a_name(monkeypatch):
    row = dict(ARCHITECTURES['tiny'], layers=(2, 2, 2, 2))
    assert 'it is VOLO' not in failing_load(monkeypatch, volo('f.pth'), shapes_of(row))
    own = shapes_of('tiny')
    del own['pos_embed']
    assert 'it is VOLO' not in failing_load(monkeypatch, volo('f.pth'), own)


# init_cfg


@pytest.mark.parametrize('extra', [dict(prefix='backbone.'), dict(map_location='cpu')], ids=str)
def test_init_cfg_with_a_key_that_is_not_read_is_an_error(extra):
    model = VOLO('tiny', init_cfg=dict(type='Pretrained', checkpoint='f.pth', **extra))
    with pytest.raises(UserError, match=rf'init_cfg must be .*{next(iter(extra))}') as error:
        model.init_weights()
    one_line(error)


def test_init_cfg_without_a_checkpoint_is_an_error():
    with pytest.raises(UserError, match='init_cfg must be dict'):
        VOLO('tiny', init_cfg=dict(type='Pretrained')).init_weights()


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit], ids=str)
@pytest.mark.parametrize('listed', [False, True])
def test_every_spelling_of_pretrained_reads_tensors_only(tmp_path, kind, listed):
    path, ran = hostile_file(tmp_path, 'zip', 'open')
    init_cfg = dict(type=kind, checkpoint=str(path))
    model = VOLO('tiny', init_cfg=[init_cfg] if listed else init_cfg)
    with pytest.raises(UserError, match='refused'):
        model.init_weights()
    assert not ran.exists()
    state = imagenet_state()
    saved(state, path)
    model = VOLO('tiny', img_size=64, init_cfg=[init_cfg] if listed else init_cfg)
    model.init_weights()
    assert_holds(model, state)


def test_pretrained_among_other_initialisers_is_an_error(tmp_path):
    path, ran = hostile_file(tmp_path, 'zip', 'open')
    both = [dict(type='Constant', val=0, layer='Linear'), dict(type='Pretrained', checkpoint=str(path))]
    with pytest.raises(UserError, match='alone'):
        VOLO('tiny', init_cfg=both).init_weights()
    assert not ran.exists()


def test_other_initialisers_of_mmengine_still_run():
    model = VOLO('tiny', init_cfg=dict(type='Constant', val=0.5, layer='Linear'))
    model.init_weights()
    assert (model.network[0][0].attn.v.weight == 0.5).all()


# Files that are not checkpoints


@pytest.fixture(params=['init_cfg', 'load_segmentor', 'read_checkpoint'])
def reader(request):
    """Each function that reads a file."""
    return {
        'init_cfg': loaded,
        'load_segmentor': lambda path: load_segmentor(nn.Linear(1, 1), str(path)),
        'read_checkpoint': lambda path: read_checkpoint(str(path)),
    }[request.param]


def test_a_missing_file_is_named(tmp_path, reader):
    with pytest.raises(UserError, match=f'checkpoint not found: {tmp_path}/none.pth') as error:
        reader(tmp_path / 'none.pth')
    one_line(error)
    with pytest.raises(UserError, match='checkpoint not found'):
        reader(tmp_path)  # a folder


DAMAGE = {
    'half a zip archive': ('f.pth', lambda zipped, old, safe: zipped[: len(zipped) // 2]),
    'a zip archive without its end': ('f.pth', lambda zipped, old, safe: zipped[:-30]),
    'half of the old format': ('f.pth', lambda zipped, old, safe: old[: len(old) // 2]),
    'ten bytes of the old format': ('f.pth', lambda zipped, old, safe: old[:10]),
    'half a safetensors file': ('f.safetensors', lambda zipped, old, safe: safe[: len(safe) // 2]),
    'ten bytes of safetensors': ('f.safetensors', lambda zipped, old, safe: safe[:10]),
    'a zip archive called safetensors': ('f.safetensors', lambda zipped, old, safe: zipped),
    'a safetensors file called pth': ('f.pth', lambda zipped, old, safe: safe),
    'nothing': ('f.pth', lambda *_: b''),
    'nothing, safetensors': ('f.safetensors', lambda *_: b''),
    'text': ('f.pth', lambda *_: b'hello world, this is text\n' * 20),
    'text, safetensors': ('f.safetensors', lambda *_: b'hello world, this is text\n' * 20),
    'a web page': ('f.pth', lambda *_: b'<!DOCTYPE html>\n<html><body>404</body></html>\n'),
    'a pointer of Git LFS': ('f.bin', lambda *_: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'),
    'zeros': ('f.pth', lambda *_: bytes(500)),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_is_called_damaged(tmp_path, damage):
    tensors = {'weight': torch.rand(1, 1), 'bias': torch.rand(1)}
    zipped = saved(tensors, tmp_path / 'good.pth').read_bytes()
    old = saved(tensors, tmp_path / 'old.pth', _use_new_zipfile_serialization=False).read_bytes()
    save_file(tensors, tmp_path / 'good.safetensors')
    for good in ('good.pth', 'old.pth', 'good.safetensors'):
        assert torch.equal(read_checkpoint(tmp_path / good)['weight'], tensors['weight'])
    name, damaged = DAMAGE[damage]
    path = tmp_path / name
    path.write_bytes(damaged(zipped, old, (tmp_path / 'good.safetensors').read_bytes()))
    with pytest.raises(UserError, match='is not a checkpoint or is damaged') as error:
        read_checkpoint(path)
    assert one_line(error).startswith(str(path))
    assert 'refused' not in one_line(error)


def test_a_file_cut_off_anywhere_is_called_damaged(tmp_path):
    whole = saved({'weight': torch.rand(1, 1)}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False).read_bytes()
    path = tmp_path / 'f.pth'
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match='is not a checkpoint or is damaged'):
            read_checkpoint(path)


@pytest.mark.parametrize('contents', [torch.zeros(2), [torch.zeros(2)], 3], ids=['Tensor', 'list', 'int'])
def test_a_file_without_a_state_dict_is_an_error(tmp_path, contents):
    with pytest.raises(UserError, match=f'contains a {type(contents).__name__}, not a state dict') as error:
        read_checkpoint(saved(contents, tmp_path / 'f.pth'))
    one_line(error)


def test_torchscript_is_an_error(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / 'f.pt')
    with pytest.warns(UserWarning, match='TorchScript'), pytest.raises(UserError, match='TorchScript') as error:
        read_checkpoint(tmp_path / 'f.pt')
    one_line(error)


# Files that run code when they are unpickled


class Hostile:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def hostile_file(folder, form: str, way: str):
    """A file that creates the second returned path when it is unpickled; this function checks that it does."""
    ran, path = folder / 'ran', folder / 'hostile.pth'
    call = {
        'open': Hostile(builtins.open, str(ran), 'w'),
        'os.system': Hostile(os.system, f'touch {ran}'),
        'exec': Hostile(builtins.exec, f'open({str(ran)!r}, "w").close()'),
    }[way]
    contents = {'state_dict': {'weight': torch.zeros(1, 1), 'bias': torch.zeros(1)}, 'meta': call}
    if form in ('zip', 'before torch 1.6'):
        torch.save(contents, path, _use_new_zipfile_serialization=form == 'zip')
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps({'meta': call}, protocol=int(form[-1])))
        pickle.loads(path.read_bytes())
    assert ran.exists(), 'this file is harmless and tests nothing'
    ran.unlink()
    return path, ran


@pytest.mark.parametrize('way', ['open', 'os.system', 'exec'])
@pytest.mark.parametrize('form', ['zip', 'before torch 1.6', 'pickle 2'])
def test_a_file_that_wants_to_run_code_is_refused_and_nothing_of_it_runs(tmp_path, form, way, reader):
    path, ran = hostile_file(tmp_path, form, way)
    with pytest.raises(UserError) as error:
        reader(path)
    assert not ran.exists()
    # pickle writes the module that the function names: io until Python 3.11, _io since
    name = {'open': f'{builtins.open.__module__}.open', 'os.system': 'posix.system', 'exec': 'exec'}[way]
    assert one_line(error).startswith(f'{path} is refused: it asks to run {name}, but only tensors are read')


@pytest.mark.parametrize('form', ['pickle 0', 'pickle 4', 'pickle 5'])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_pickle_that_torch_never_writes_does_not_run_either(tmp_path, form, reader):
    path, ran = hostile_file(tmp_path, form, 'os.system')
    with pytest.raises(UserError) as error:
        reader(path)
    assert not ran.exists()
    assert one_line(error).startswith(f'{path} is ')


def test_a_hostile_file_called_safetensors_does_not_run(tmp_path, reader):
    path, ran = hostile_file(tmp_path, 'zip', 'open')
    with pytest.raises(UserError):
        reader(path.rename(path.with_suffix('.safetensors')))
    assert not ran.exists()


def test_a_pickled_model_is_refused_by_its_class(tmp_path):
    with pytest.raises(UserError, match=r'refused: it asks to run torch\.nn\.modules\.linear\.Linear') as error:
        read_checkpoint(saved(nn.Linear(1, 1), tmp_path / 'f.pth'))
    one_line(error)


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (HistoryBuffer, '__subclasses__'),
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, '_statistics_methods'),  # a process-wide dictionary
        (np.ndarray, 'tofile'),
        (torch.Tensor, 'backward'),
    ],
    ids=str,
)
def test_getattr_reaches_nothing_but_a_history_buffers_statistics(tmp_path, owner, name):
    path = saved({'weight': torch.zeros(1), 'x': Hostile(getattr, owner, name)}, tmp_path / 'f.pth')
    assert 'builtins.getattr' in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with pytest.raises(UserError, match='refused') as error:
        read_checkpoint(path)
    one_line(error)


def test_reading_leaves_torchs_list_of_safe_types_alone(tmp_path):
    good, (hostile, _) = saved({'a': torch.zeros(1)}, tmp_path / 'f.pth'), hostile_file(tmp_path, 'zip', 'open')
    torch.serialization.add_safe_globals([argparse.Namespace])  # the user's setting
    try:
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(good)
        assert set(torch.serialization.get_safe_globals()) == before
        with pytest.raises(UserError):
            read_checkpoint(hostile)
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()


# URLs


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's cache, in a folder of this test."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def server(tmp_path):
    """A web server for ``root`` that counts its requests."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            web.requests.append(self.path)

    root = tmp_path / 'served'
    root.mkdir()
    web = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(root)))
    web.root, web.requests, web.url = root, [], f'http://127.0.0.1:{web.server_port}'
    thread = threading.Thread(target=web.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()

    def stop():
        if thread.is_alive():
            web.shutdown()
            thread.join()
            web.server_close()

    web.stop = stop
    yield web
    stop()


@pytest.mark.parametrize('name', ['volo.pth.tar', 'model.safetensors'])
def test_a_url_is_fetched_once_and_then_read_without_a_network(server, hub, name):
    state = imagenet_state()
    save_file(state, server.root / name) if name.endswith('.safetensors') else saved(state, server.root / name)
    assert_holds(loaded(f'{server.url}/{name}?download=true'), state)
    requests = len(server.requests)
    assert requests >= 1 and [path.name.endswith(name) for path in hub.iterdir()] == [True]
    server.stop()
    assert_holds(loaded(f'{server.url}/{name}?download=true'), state)
    assert len(server.requests) == requests


def test_two_urls_with_the_same_file_name_are_two_files(server, hub):
    states = {}
    for folder in ('volo_d1_224', 'volo_d1_384'):
        states[folder] = imagenet_state()
        (server.root / folder).mkdir()
        save_file(states[folder], server.root / folder / 'model.safetensors')
    for folder, state in states.items():
        assert_holds(loaded(f'{server.url}/{folder}/model.safetensors'), state)


def served(server) -> tuple[dict, str, str]:
    """A state dict, the URL of its file, and the file's SHA-256."""
    state = imagenet_state()
    path = saved(state, server.root / 'volo.pth')
    return state, f'{server.url}/volo.pth', hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_download_with_the_given_sha256_is_read(server, hub):
    state, url, digest = served(server)
    for spelling in (digest, digest.upper()):
        assert_holds(loaded(f'{url}#sha256={spelling}'), state)
    assert_holds(loaded(url), state)
    assert len(server.requests) == 1  # the file is the same with and without a hash


@pytest.mark.parametrize('cached', [False, True])
def test_a_download_with_another_sha256_is_refused_and_removed(server, hub, cached):
    state, url, digest = served(server)
    if cached:
        loaded(url)
    other = '0' * 64
    with pytest.raises(UserError, match=f'{url} is refused: its SHA-256 must be {other}, got {digest}') as error:
        loaded(f'{url}#sha256={other}')
    assert one_line(error) and list(hub.iterdir()) == []
    assert_holds(loaded(f'{url}#sha256={digest}'), state)


@pytest.mark.parametrize('digest', ['', 'abc', 'g' * 64, '0' * 63])
def test_a_sha256_that_is_none_is_an_error_before_the_download(server, hub, digest):
    with pytest.raises(UserError, match=f'#sha256= must be 64 hex digits, got {digest!r}'):
        loaded(f'{server.url}/volo.pth#sha256={digest}')
    assert server.requests == []


@pytest.mark.parametrize(
    ('url', 'expected'),
    [
        ('https://download.pytorch.org/models/resnet18-f37072fd.pth', 'f37072fd'),
        ('https://download.pytorch.org/models/resnet18.pth', ''),
        ('https://download.openmmlab.com/x/fcn_192608-efe53f0d.pth', ''),  # the hash of the file before publishing
    ],
)
def test_file_names_tell_a_sha256_where_they_keep_to_torchs_convention(url, expected):
    assert _expected_sha256(url) == expected


def test_a_url_that_is_not_there_is_an_error_and_leaves_nothing(server, hub):
    with pytest.raises(UserError, match=f'cannot download {server.url}/none.pth .*404') as error:
        loaded(f'{server.url}/none.pth')
    one_line(error)
    assert list(hub.iterdir()) == []


def test_a_host_that_does_not_answer_is_an_error(hub):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match='cannot download .*refused.*download it by hand and give its path') as error:
        loaded(f'http://127.0.0.1:{port}/volo.pth')
    one_line(error)


@pytest.mark.parametrize('url', ['http://127.0.0.1:port/f.pth', 'http://[::1/f.pth', 'http://127.0.0.1/a b.pth'])
def test_a_url_that_is_none_is_an_error(hub, url):
    with pytest.raises(UserError, match='cannot download') as error:
        loaded(url)
    assert url in one_line(error)


def test_a_damaged_download_says_where_it_lies(server, hub):
    (server.root / 'f.pth').write_text('<html>log in first</html>')
    with pytest.raises(UserError, match='damaged') as error:
        loaded(f'{server.url}/f.pth')
    assert f'downloaded to {next(hub.iterdir())}' in one_line(error)


def test_a_hostile_download_does_not_run(server, hub):
    _, ran = hostile_file(server.root, 'zip', 'os.system')
    with pytest.raises(UserError, match='refused'):
        loaded(f'{server.url}/hostile.pth')
    assert len(list(hub.iterdir())) == 1 and not ran.exists()


# timm's names


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """huggingface_hub with an empty cache and without a network; its environment variables are read at import."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    return tmp_path / 'cache'


@pytest.mark.parametrize('name', ['volo_d1_224.sail_in1k', 'volo_d1_224'])
def test_a_name_of_timms_loads_from_the_hubs_cache_without_a_network(offline, d1_file, name, log):
    repository = offline / 'models--timm--volo_d1_224.sail_in1k'
    revision = '0123456789abcdef0123456789abcdef01234567'
    (repository / 'snapshots' / revision).mkdir(parents=True)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text(revision)
    (repository / 'snapshots' / revision / 'model.safetensors').symlink_to(d1_file)
    model = VOLO('d1', init_cfg=dict(type='Pretrained', checkpoint=f'timm://{name}'))
    model.init_weights()
    assert_holds(model, read_checkpoint(d1_file))
    assert len(log) == 1 and f'tensors loaded from timm://{name};' in log[0]


def test_a_name_of_timms_without_network_and_cache_is_an_error(offline):
    with pytest.raises(UserError, match=r'cannot download timm://volo_d4_448\.sail_in1k .*give its path') as error:
        loaded('timm://volo_d4_448.sail_in1k')
    one_line(error)


@pytest.mark.parametrize('name', ['volo_nope', 'volo_d1_224.nope', 'resnet50', ''])
def test_a_name_that_timm_has_not_is_answered_with_those_it_has(offline, name):
    with pytest.raises(UserError, match='timm has no VOLO weights named') as error:
        loaded(f'timm://{name}')
    sentence = one_line(error)
    assert repr(name) in sentence
    for known in ('volo_d1_224.sail_in1k', 'volo_d4_448.sail_in1k', 'volo_d5_512.sail_in1k'):
        assert known in sentence


def test_what_counts_as_classifier_is_named_exactly():
    assert all(PRETRAINED.classifier.fullmatch(key) for key in CLASSIFIER_KEYS)
    kept = [*VOLO('tiny').state_dict(), 'norm', 'head', 'heads.weight', 'network.4.0.norm.weight', 'cls_token.weight']
    assert [key for key in kept if PRETRAINED.classifier.fullmatch(key)] == []


# Whole segmentors


@pytest.mark.parametrize('form', ['as trained', 'module.', 'bare'])
def test_a_segmentors_checkpoint_loads_and_gives_its_meta(tmp_path, form):
    theirs, ours = randomised(segmentor()), segmentor()
    contents = training_checkpoint(theirs)
    meta = contents['meta']
    if form == 'module.':
        contents['state_dict'] = {f'module.{key}': tensor for key, tensor in contents['state_dict'].items()}
    if form == 'bare':
        contents, meta = contents['state_dict'], {}
    assert load_segmentor(ours, str(saved(contents, tmp_path / 'f.pth'))) == meta
    assert_holds(ours, theirs.state_dict())


def failing_segmentor(model: nn.Module, path) -> str:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match='does not fit the model of this config') as error:
        load_segmentor(model, str(path))
    assert_holds(model, before)
    return one_line(error)


def test_a_segmentor_of_other_classes_names_the_tensor(tmp_path):
    path = saved({'state_dict': randomised(segmentor(classes=7)).state_dict()}, tmp_path / 'f.pth')
    sentence = failing_segmentor(segmentor(classes=4), path)
    assert '2 of another shape (decode_head.conv_seg.weight is [7, 8, 1, 1] instead of [4, 8, 1, 1]' in sentence


def test_a_segmentor_with_a_tensor_too_few_or_too_many_names_it(tmp_path):
    state = segmentor().state_dict()
    state['decode_head.surplus'] = state.pop('backbone.norm0.bias')
    sentence = failing_segmentor(segmentor(), saved({'state_dict': state}, tmp_path / 'f.pth'))
    assert '1 missing (backbone.norm0.bias); 1 unexpected (decode_head.surplus)' in sentence


@pytest.mark.parametrize('wrapper', [None, 'state_dict'])
def test_a_backbones_checkpoint_is_no_segmentors(tmp_path, wrapper):
    state = imagenet_state()
    path = saved({wrapper: state} if wrapper else state, tmp_path / 'f.pth')
    assert 'missing (backbone.pos_embed' in failing_segmentor(segmentor(), path)


@pytest.mark.parametrize('contents', [{'state_dict': [1]}, {'state_dict': {'backbone.pos_embed': 3}}, {1: 2}], ids=str)
def test_what_is_no_tensor_counts_as_missing(tmp_path, contents):
    assert 'missing (backbone.pos_embed' in failing_segmentor(segmentor(), saved(contents, tmp_path / 'f.pth'))


# Other architectures


class Pyramid(nn.Module):
    """A backbone without a tensor name that VOLO has."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.arch, self.out_indices = 'p1', (0,)
        self.first = nn.Conv2d(channels, 4, 3)
        self.places = nn.Parameter(torch.zeros(1, side, side, 4))
        self.last_norm = nn.LayerNorm(4)


PYRAMID = PretrainedFormat(
    name='Pyramid',
    classifier=re.compile(r'fc\..+'),
    stem='first.weight',
    new=re.compile(r'last_norm\..+'),
    unbuilt=lambda key, last_stage: key.startswith('later.') and last_stage == 0,
    recognise=lambda state: 'p2' if 'second.weight' in state else None,
    resize={'places': resize_pos_embed},
)


def pyramid_state() -> dict[str, torch.Tensor]:
    state = {key: torch.rand_like(value) for key, value in Pyramid(3, 4).state_dict().items() if 'norm' not in key}
    return state | {'fc.weight': torch.rand(2, 4), 'later.weight': torch.rand(3)}


def test_a_description_is_all_that_another_architecture_needs(tmp_path):
    state, model = pyramid_state(), Pyramid(1, 6)
    load_pretrained(model, str(saved(state, tmp_path / 'f.pth')), PYRAMID)
    assert torch.allclose(model.first.weight, state['first.weight'].sum(1, keepdim=True))
    assert torch.equal(model.places, resize_pos_embed(state['places'], (6, 6)))
    assert torch.equal(model.first.bias, state['first.bias'])


def test_another_architecture_is_named_in_messages(tmp_path):
    path = saved(pyramid_state() | {'second.weight': torch.rand(1)}, tmp_path / 'f.pth')
    with pytest.raises(UserError, match="does not fit Pyramid arch='p1', it is Pyramid arch='p2': 1 unexpected"):
        load_pretrained(Pyramid(3, 4), str(path), PYRAMID)


# The baseline's weights, from a package


def test_weights_of_the_baseline_are_matched_by_order_and_shape():
    spec = importlib.util.spec_from_file_location('lite0', ROOT / 'tools/efficientnet_lite0_weights.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    theirs = timm.create_model('tf_efficientnet_lite0').state_dict()
    state = {f'_{i}': torch.rand(tensor.shape) for i, tensor in enumerate(theirs.values())}
    cfg = load_config('efficientnet_lite0_camvid', {})
    backbone = MODELS.build(cfg.model.backbone)
    backbone.load_state_dict(tool.renamed(state))  # strict
    assert torch.equal(backbone.timm_model.conv_stem.weight, state['_0'])
    with pytest.raises(SystemExit, match='these are not the tensors of timm'):
        tool.renamed(dict(reversed(state.items())))
