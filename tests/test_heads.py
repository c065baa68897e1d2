"""Heads and neck: outputs and gradients of mmseg's modules, and checkpoints that can be exchanged with them."""

import copy
import re
from pathlib import Path

import mmseg
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models.decode_heads import SegformerHead as MmsegSegformerHead
from mmseg.models.decode_heads import UPerHead as MmsegUPerHead
from mmseg.models.necks import MultiLevelNeck as MmsegMultiLevelNeck
from mmseg.registry import MODELS
from parity import assert_close, error

from mmseg_volo import MultiLevelNeck, SegformerHead, UPerHead
from mmseg_volo.models import heads
from mmseg_volo.models.pretrained import load_segmentor
from mmseg_volo.ops.resized_maps import operator

HEAD = dict(
    in_channels=[24, 32, 40, 48],
    in_index=[0, 1, 2, 3],
    channels=96,
    dropout_ratio=0.1,
    num_classes=7,
    norm_cfg=dict(type='BN'),
    align_corners=False,
)
NECK = dict(in_channels=[24, 32, 32, 32], out_channels=112, scales=[2, 2, 1, 0.5], norm_cfg=dict(type='BN'))
KINDS = {
    'UPerHead': (UPerHead, MmsegUPerHead, dict(HEAD, pool_scales=(1, 2, 3, 6))),
    'SegformerHead': (SegformerHead, MmsegSegformerHead, HEAD),
    'MultiLevelNeck': (MultiLevelNeck, MmsegMultiLevelNeck, NECK),
}
SIZES = [(32, 48), (37, 51), (8, 8)]  # the last is 1 x 1 at the coarsest level


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


def pair(kind: str, **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and mmseg's, with equal random weights."""
    ours, theirs, settings = KINDS[kind]
    torch.manual_seed(0)
    ours, theirs = (cls(**copy.deepcopy(settings | changes)) for cls in (ours, theirs))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in theirs.named_buffers():
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 2)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def maps(kind: str, size: tuple[int, int], batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = NECK['in_channels'] if kind == 'MultiLevelNeck' else HEAD['in_channels']
    strides = (1, 2, 2, 2) if kind == 'MultiLevelNeck' else (1, 2, 4, 8)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s), generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for c, s in zip(channels, strides, strict=True)
    ]


def results(module: torch.nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, gradients and running statistics; dropout draws the same numbers in both modules."""
    torch.manual_seed(1)
    outputs = module(inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs).backward()
    found = {f'output {i}': y.detach() for i, y in enumerate(outputs)}
    found |= {f'd map {i}': x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {f'd {name}': p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_equals_mmsegs_module_in_value_and_every_gradient(kind, size, training):
    ours, theirs = (module.double().train(training) for module in pair(kind))
    found = results(ours, maps(kind, size, 3, torch.float64))
    expected = results(theirs, maps(kind, size, 3, torch.float64))
    assert found.keys() == expected.keys()
    for name in expected:
        assert error(found[name], expected[name]) < 1e-10, name


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_norms_merged_into_convolutions_in_inference_give_the_same(kind, affine, monkeypatch):
    ours, theirs = (module.double().eval() for module in pair(kind, norm_cfg=dict(type='BN', affine=affine)))
    monkeypatch.setattr(heads, 'FOLDED', 0)
    inputs = maps(kind, (37, 51), 2, torch.float64)
    with torch.no_grad():
        expected = theirs(inputs)
        monkeypatch.setattr(torch.nn.functional, 'batch_norm', None)  # fails where a BatchNorm runs
        found = ours(inputs)
    for mine, other in zip(found, expected, strict=True):
        assert error(mine, other) < 1e-10


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        ('UPerHead', dict(align_corners=True)),
        ('UPerHead', dict(norm_cfg=dict(type='GN', num_groups=8))),
        ('UPerHead', dict(norm_cfg=dict(type='SyncBN'))),
        ('UPerHead', dict(norm_cfg=None)),  # convolutions with a bias
        ('UPerHead', dict(pool_scales=(1, 4))),
        ('UPerHead', dict(in_index=[1, 2, 3], in_channels=[32, 40, 48])),
        ('SegformerHead', dict(align_corners=True)),
        ('MultiLevelNeck', dict(in_channels=[24], scales=[4, 2, 1, 0.5])),
    ],
    ids=str,
)
def test_settings_give_the_same_as_in_mmseg(kind, changes):
    ours, theirs = (module.double().eval() for module in pair(kind, **changes))  # SyncBN trains only on GPUs
    count = 1 if changes.get('in_channels') == [24] else 4
    found, expected = (results(module, maps(kind, (33, 40), 1, torch.float64)[:count]) for module in (ours, theirs))
    for name in expected:
        assert error(found[name], expected[name]) < 1e-10, name


@pytest.mark.parametrize('kind', KINDS)
def test_bfloat16_errs_no_more_than_mmsegs(kind):
    ours, theirs = (module.eval() for module in pair(kind))
    exact = results(copy.deepcopy(theirs).double(), maps(kind, (32, 48), 2, torch.float64))
    found = []
    for module in (ours, theirs):
        with torch.autocast('cpu', torch.bfloat16):
            outputs = module(maps(kind, (32, 48), 2, torch.float32))
        found.append(outputs if isinstance(outputs, tuple) else (outputs,))
    for i, (mine, reference) in enumerate(zip(*found, strict=True)):
        assert mine.dtype == reference.dtype
        expected = exact[f'output {i}']
        assert_close(mine.bfloat16(), expected, eager_error=error(reference, expected), what=str(i))


@pytest.mark.parametrize('change', ['hook', 'replaced'])
def test_changed_convolutions_run_as_in_mmseg(change):
    ours, theirs = (module.eval() for module in pair('UPerHead'))
    calls = []
    for module in (ours, theirs):
        if change == 'hook':
            module.fpn_bottleneck.conv.register_forward_hook(lambda *_: calls.append(1))
        else:
            module.fpn_bottleneck.conv = torch.nn.Sequential(module.fpn_bottleneck.conv, torch.nn.Tanh())
    inputs = maps('UPerHead', (32, 48), 1, torch.float32)
    assert torch.allclose(ours(inputs), theirs(inputs), atol=1e-5)
    assert len(calls) == (2 if change == 'hook' else 0)


def test_the_enlarged_maps_are_not_stored():
    ours, theirs = pair('UPerHead')
    stored = []
    for module in (ours, theirs):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x,
            lambda x: x,
        ):
            module(maps('UPerHead', (64, 64), 2, torch.float32))
        stored.append(sum(sizes.values()))
    assert stored[0] < 0.75 * stored[1]


def test_checkpoints_go_to_mmseg_and_back_through_files(tmp_path):
    settings = dict(
        type='EncoderDecoder',
        backbone=dict(type='mmseg_volo.VOLO', arch='tiny', img_size=64),
        auxiliary_head=None,
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )

    def segmentor(neck: str, head: str) -> torch.nn.Module:
        return MODELS.build(
            dict(
                **settings,
                neck=dict(NECK, type=neck, in_channels=[64, 128, 128, 128]),
                decode_head=dict(HEAD, type=head, in_channels=[112] * 4),
            )
        ).eval()

    ours = segmentor('mmseg_volo.MultiLevelNeck', 'mmseg_volo.UPerHead')
    theirs = segmentor('MultiLevelNeck', 'UPerHead')
    assert type(ours.decode_head) is UPerHead and type(theirs.decode_head) is MmsegUPerHead
    x = torch.randn(1, 3, 64, 96)
    for number, (source, target) in enumerate([(theirs, ours), (ours, theirs)]):
        path = tmp_path / f'{number}.pth'
        for parameter in source.decode_head.parameters():
            parameter.data.normal_(std=0.1)
        torch.save({'state_dict': source.state_dict()}, path)
        load_segmentor(target, str(path))
        assert source.state_dict().keys() == target.state_dict().keys()
        with torch.no_grad():
            assert error(target(x), source(x).double()) < 1e-5


def test_mmsegs_config_of_swin_needs_only_another_type(tmp_path):
    block = re.search(r'```python\n(_base_ = .*?)```', (ROOT / 'docs/heads.md').read_text(), re.S)[1]
    configs = Path(mmseg.__file__).parent / '.mim/configs/swin'
    (tmp_path / 'swin.py').write_text(block.replace('./swin-tiny', f'{configs}/swin-tiny'))
    cfg = Config.fromfile(tmp_path / 'swin.py')
    original = Config.fromfile(configs / re.search(r"'\./(.*)'", block)[1])
    models = []
    for settings in (cfg.model, original.model):
        settings.backbone.init_cfg = settings.pretrained = None
        models.append(MODELS.build(settings).eval())
    ours, theirs = models
    assert type(ours.decode_head) is UPerHead and type(theirs.decode_head) is MmsegUPerHead
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert error(ours(x), theirs(x).double()) < 1e-5


@pytest.mark.parametrize('kind', ['UPerHead', 'SegformerHead'])
def test_export_records_every_size(kind):
    ours = pair(kind)[0].eval()
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ('height', 'width'))
    inputs = [x.detach() for x in maps(kind, (32, 48), 1, torch.float32)]
    dims = [{2: 8 // s * height, 3: 8 // s * width} for s in (1, 2, 4, 8)]
    program = torch.export.export(ours, (inputs,), dynamic_shapes=(dims,)).module()
    for size in ((32, 48), (64, 16), (24, 80)):
        inputs = [x.detach() for x in maps(kind, size, 1, torch.float32)]
        assert torch.allclose(program(inputs), ours(inputs), atol=1e-5)


def test_compiles_as_one_graph():
    ours = pair('UPerHead')[0].eval()
    inputs = [x.detach() for x in maps('UPerHead', (32, 48), 1, torch.float32)]
    compiled = torch.compile(ours, backend='aot_eager', fullgraph=True)
    assert torch.allclose(compiled(inputs), ours(inputs), atol=1e-5)


def test_every_convolution_after_a_resize_goes_through_the_operator(monkeypatch):
    calls = []
    whole = operator._direct
    monkeypatch.setattr(operator, '_direct', lambda maps, *rest: calls.append(len(maps)) or whole(maps, *rest))
    for kind in KINDS:
        pair(kind)[0].eval()(maps(kind, (64, 64), 2, torch.float32))
    assert calls.count(5) == 1 and calls.count(4) == 2  # pyramid pooling; both heads' fusion
    assert calls.count(1) == 2  # the neck's two enlarged maps
