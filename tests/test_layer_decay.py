import logging
import re

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from mmseg_volo import ARCHITECTURES, VOLO
from mmseg_volo.errors import UserError

RATE = 0.9
BLOCKS = (2, 2, 2, 1)  # of VOLO-tiny
PLACES = (0, 2, 3, 4)  # of the stages in ``network``


def segmentor(**backbone) -> nn.Module:
    init_default_scope('mmseg')
    return MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(type='VOLO', arch='tiny', img_size=64, **backbone),
            neck=dict(type='MultiLevelNeck', in_channels=[64, 128, 128, 128], out_channels=8, scales=[2, 2, 1, 0.5]),
            decode_head=dict(
                type='UPerHead',
                in_channels=[8, 8, 8, 8],
                in_index=[0, 1, 2, 3],
                channels=8,
                num_classes=4,
                norm_cfg=dict(type='BN'),
                align_corners=False,
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        )
    )


def optimizer(model: nn.Module, paramwise_cfg=None, **options):
    """The optimizer that a config builds."""
    return build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', **{'lr': 1e-3, 'weight_decay': 0.05, **options}),
            constructor='VOLOLayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=RATE) if paramwise_cfg is None else paramwise_cfg,
        ),
    ).optimizer


def groups_by_name(model: nn.Module, **kwargs) -> dict[str, dict]:
    """Parameter group of each trained parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer(model, **kwargs).param_groups for p in group['params']}


def learning_rate(model: nn.Module, prefix: str) -> float:
    """The learning rate that all parameters under ``prefix`` share."""
    rates = {group['lr'] for name, group in groups_by_name(model).items() if name.startswith(prefix)}
    assert len(rates) == 1, (prefix, rates)
    return rates.pop()


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


def test_every_parameter_is_in_exactly_one_group():
    model = segmentor()
    found = [id(p) for group in optimizer(model).param_groups for p in group['params']]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


def test_learning_rates_grow_by_one_step_per_block_through_all_four_stages():
    model = segmentor()
    blocks = [f'backbone.network.{i}.{j}.' for i, n in zip(PLACES, BLOCKS, strict=True) for j in range(n)]
    assert len(blocks) == sum(map(len, (model.backbone.network[i] for i in PLACES))) == 7
    rates = [learning_rate(model, block) for block in blocks]
    assert all(lower < higher for lower, higher in zip(rates, rates[1:], strict=False))
    assert rates == pytest.approx([1e-3 * RATE ** (8 - layer) for layer in range(1, 8)])


def test_the_stem_comes_before_the_first_block_and_the_head_after_the_last():
    model = segmentor()
    assert learning_rate(model, 'backbone.patch_embed.') == pytest.approx(1e-3 * RATE**8)  # blocks + 1
    for prefix in ('decode_head.', 'neck.', *(f'backbone.norm{stage}.' for stage in range(4))):
        assert learning_rate(model, prefix) == 1e-3


@pytest.mark.parametrize('prefix', ['backbone.pos_embed', 'backbone.network.1.'])
def test_what_prepares_stage_2_learns_like_its_first_block(prefix):
    model = segmentor()
    assert learning_rate(model, prefix) == learning_rate(model, 'backbone.network.2.0.')


def test_learning_rates_are_the_scales_of_the_groups():
    for group in optimizer(segmentor(), lr=0.02).param_groups:
        assert group['lr'] == pytest.approx(0.02 * group['lr_scale'])


def test_matrices_and_kernels_are_decayed_and_nothing_else():
    model = segmentor()
    groups = groups_by_name(model)
    undecayed = {name for name, group in groups.items() if group['weight_decay'] == 0}
    assert {group['weight_decay'] for group in groups.values()} == {0, 0.05}
    assert undecayed == {n for n, p in model.named_parameters() if p.ndim <= 1 or n == 'backbone.pos_embed'}
    assert undecayed >= {
        'backbone.pos_embed',
        'backbone.norm0.weight',
        'backbone.patch_embed.conv.1.weight',  # a BatchNorm of the stem
        'backbone.patch_embed.conv.1.bias',
        'backbone.patch_embed.proj.bias',
        'backbone.network.0.0.norm1.weight',
        'backbone.network.0.0.attn.attn.bias',
        'backbone.network.4.0.mlp.fc1.bias',
        'decode_head.conv_seg.bias',
    }
    assert undecayed.isdisjoint(
        ['backbone.patch_embed.conv.0.weight', 'backbone.network.0.0.attn.v.weight', 'decode_head.conv_seg.weight']
    )


def test_frozen_parameters_are_in_no_group_and_move_no_other():
    model = segmentor(frozen_stages=2)
    groups = groups_by_name(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = set(dict(model.named_parameters())) - trained
    assert set(groups) == trained
    assert {'backbone.pos_embed', 'backbone.patch_embed.proj.weight', 'backbone.network.2.1.mlp.fc2.bias'} <= frozen
    everything = groups_by_name(segmentor())
    assert {name: group['lr'] for name, group in groups.items()} == {name: everything[name]['lr'] for name in trained}


def test_fewer_stages_are_counted_as_they_are_built():
    model = nn.Module()
    model.backbone = VOLO('tiny', img_size=64, out_indices=(0, 1))
    assert learning_rate(model, 'backbone.patch_embed.') == pytest.approx(1e-3 * RATE**5)
    assert learning_rate(model, 'backbone.network.2.1.') == pytest.approx(1e-3 * RATE)


def test_a_model_in_a_wrapper_is_found():
    wrapper = nn.Module()
    wrapper.module = segmentor()
    assert len(optimizer(wrapper).param_groups) == len(optimizer(wrapper.module).param_groups)


def test_a_decay_rate_of_1_is_plain_training_without_decay_of_vectors():
    groups = optimizer(segmentor(), paramwise_cfg=dict(decay_rate=1)).param_groups
    assert {group['lr'] for group in groups} == {1e-3}
    assert {group['weight_decay'] for group in groups} == {0, 0.05}


@pytest.mark.parametrize('arch', sorted(ARCHITECTURES))
def test_every_layer_of_every_architecture_has_parameters(arch):
    with torch.device('meta'):
        model = nn.Module()
        model.backbone = VOLO(arch)
    rates = {group['lr'] for group in optimizer(model).param_groups}
    layers = sum(ARCHITECTURES[arch]['layers']) + 2
    assert sorted(rates) == pytest.approx([1e-3 * RATE**i for i in reversed(range(layers))])


def test_one_table_says_what_learns_how_fast(log):
    model = segmentor()
    optimizer(model)
    tables = [line for line in log if 'lr_scale' in line]
    assert len(tables) == len(log) == 1
    rows = re.findall(r'\|\s*(\d+)\s*\|\s*([\d.]+)\s*\|\s*(\d+)\s*\|\s*(\d+)\s*\|', tables[0])
    assert [int(row[0]) for row in rows] == list(range(9))
    assert [float(row[1]) for row in rows] == pytest.approx([RATE ** (8 - layer) for layer in range(9)], abs=1e-4)
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith('pos_embed')]
    assert sum(int(row[2]) for row in rows) == len(matrices)
    assert sum(int(row[3]) for row in rows) == len(list(model.parameters())) - len(matrices)


def test_a_step_moves_the_head_further_than_the_stem():
    model = segmentor()
    stepper = optimizer(model, weight_decay=0.0)
    names = ('backbone.patch_embed.conv.0.weight', 'decode_head.conv_seg.weight')
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepper.step()
    stem, head = ((model.get_parameter(name) - before[name]).abs().mean().item() for name in names)
    assert head == pytest.approx(1e-3, rel=1e-3) and stem == pytest.approx(1e-3 * RATE**8, rel=1e-3)


@pytest.mark.parametrize('backbone', [nn.Conv2d(3, 8, 1), None], ids=['another backbone', 'no backbone'])
def test_a_backbone_of_another_package_is_an_error(backbone):
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    if backbone is not None:
        model.backbone = backbone
    name = 'Sequential' if backbone is None else 'Conv2d'
    with pytest.raises(UserError, match=f'needs a backbone of mmseg_volo, got {name}'):
        optimizer(model)


@pytest.mark.parametrize(
    'paramwise_cfg',
    [
        {},
        dict(decay_rates=0.9),
        dict(decay_rate=None),
        dict(decay_rate='0.9'),
        dict(decay_rate=0),
        dict(decay_rate=-0.9),
        dict(decay_rate=1.1),
        dict(decay_rate=float('nan')),
        dict(decay_rate=0.9, num_layers=12),
        dict(custom_keys={}),
    ],
    ids=str,
)
def test_a_missing_or_impossible_decay_rate_is_an_error(paramwise_cfg):
    with pytest.raises(UserError, match=r'requires paramwise_cfg=dict\(decay_rate=...\) with a rate .* got') as error:
        optimizer(segmentor(), paramwise_cfg=paramwise_cfg)
    assert str(paramwise_cfg) in str(error.value)


def test_no_paramwise_cfg_at_all_is_an_error():
    cfg = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), constructor='VOLOLayerDecayConstructor')
    with pytest.raises(UserError, match='requires paramwise_cfg'):
        build_optim_wrapper(segmentor(), dict(type='OptimWrapper', **cfg))


@pytest.mark.parametrize('option', ['lr', 'weight_decay'])
def test_an_optimizer_without_a_base_to_scale_is_an_error(option):
    with pytest.raises(UserError, match='needs lr and weight_decay'):
        optimizer(segmentor(), **{option: None})
