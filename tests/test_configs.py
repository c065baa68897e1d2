import copy
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS, HOOKS, MODELS

from mmseg_volo import COATNET_ARCHITECTURES, HVT, VOLO, CoAtNet, DurableEarlyStoppingHook

CONFIGS = ROOT / 'configs'
LEAVES = sorted(path.name for path in CONFIGS.glob('*.py'))
BASES = sorted(path.stem for path in (CONFIGS / '_base_').glob('*.py'))
GRID = [
    f'volo_{arch}{head}_{dataset}.py'
    for arch in ('d1', 'd2', 'd3', 'd4', 'd5')
    for head in ('', '_segformer')
    for dataset in ('cityscapes', 'ade20k')
]
POSITIONS = r'pos_embed|relative_position_bias_table|rel_pos\.mlp'
BACKBONES = {'volo': VOLO, 'coatnet': CoAtNet, 'hvt': HVT}
COATNETS = [f'coatnet_{arch}_{data}.py' for arch in ('1_rw', 'rmlp_2_rw') for data in ('cityscapes', 'ade20k')]


def bases_of(path: Path) -> set[str]:
    """Names of the base configs that a config inherits, directly or indirectly."""
    found = set()
    for dots, module in re.findall(r'^    from (\.+)([\w.]+) import \*$', path.read_text(), re.MULTILINE):
        base = path.parents[len(dots) - 1] / f'{module.replace(".", "/")}.py'
        found |= bases_of(base) | ({base.stem} if base.parent.name == '_base_' else set())
    return found


def backbone_of(leaf: str) -> tuple[type, str]:
    """Class and arch of the backbone that a leaf's name states."""
    name = re.fullmatch(r'(\w+?)_(.+?)(_segformer)?_(cityscapes|ade20k|camvid|toy_streets)(_layer_decay)?\.py', leaf)
    return BACKBONES[name[1]], name[2]


def load(leaf: str) -> Config:
    return Config.fromfile(CONFIGS / leaf)


def build(leaf: str) -> tuple[Config, torch.nn.Module]:
    cfg = load(leaf)
    init_default_scope('mmseg')
    with torch.device('meta'):
        return cfg, MODELS.build(copy.deepcopy(cfg.model))


def upstream_types(node) -> list:
    if isinstance(node, dict):
        found = [node['type']] if 'type' in node else []
        return found + [t for value in node.values() for t in upstream_types(value)]
    if isinstance(node, list | tuple):
        return [t for value in node for t in upstream_types(value)]
    return []


def test_the_documented_leaves_exist():
    assert set(GRID) <= set(LEAVES)
    assert {'volo_tiny_toy_streets.py', 'volo_tiny_camvid.py', 'volo_d1_camvid.py'} <= set(LEAVES)
    assert {'hvt_tiny_camvid.py', 'hvt_s1_camvid.py'} <= set(LEAVES)
    assert {*COATNETS, 'coatnet_tiny_camvid.py', 'coatnet_nano_rw_camvid.py'} <= set(LEAVES)


def test_every_base_has_a_user():
    used = set().union(*(bases_of(CONFIGS / leaf) for leaf in LEAVES))
    assert BASES and sorted(used | {'own_data'}) == BASES  # new-dataset's configs use that (test_new_dataset.py)


@pytest.mark.parametrize('leaf', LEAVES)
def test_leaf_is_short_and_states_its_batch(leaf):
    text = (CONFIGS / leaf).read_text()
    assert len(text.splitlines()) <= 40
    assert leaf.removesuffix('.py').isidentifier()
    assert re.match(r'# (VOLO|CoAtNet|HVT)-\w+ (\(.+\) )?\+ .*: \d+ (GPUs?|process(es)?) x \d+ images', text)
    bases = bases_of(CONFIGS / leaf)
    assert len(bases & {'camvid', 'cityscapes', 'ade20k', 'toy_streets'}) == 1
    assert len(bases & {'upernet', 'segformer'}) == 1
    assert 'runtime' in bases and any(base.startswith('schedule_') for base in bases)


def flat(node, prefix: str = '') -> dict[str, object]:
    """Values by path, such as ``model.backbone.arch``."""
    if isinstance(node, dict):
        return {path: value for key in node for path, value in flat(node[key], f'{prefix}.{key}').items()}
    return {prefix.removeprefix('.'): node}


@pytest.mark.parametrize('dataset', ['cityscapes', 'ade20k'])
@pytest.mark.parametrize('n', range(1, 6))
def test_both_heads_get_the_same_backbone_data_and_schedule(n, dataset):
    upernet, segformer = (load(f'volo_d{n}{head}_{dataset}.py').to_dict() for head in ('', '_segformer'))
    assert {key for key in upernet if upernet[key] != segformer[key]} == {'model'}
    parts = {key for key in upernet['model'] | segformer['model'] if key not in ('decode_head', 'auxiliary_head')}
    assert all(upernet['model'][part] == segformer['model'][part] for part in parts)


def test_layer_decay_changes_the_optimizer_alone():
    plain, decayed = (load(f'volo_d5_ade20k{name}.py').to_dict() for name in ('', '_layer_decay'))
    assert {key for key in plain if plain[key] != decayed[key]} == {'optim_wrapper'}
    assert decayed['optim_wrapper']['paramwise_cfg'] == dict(decay_rate=0.9)


def test_a_config_outside_inherits_by_the_name_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / 'mine.py'
    mine.write_text(
        'from mmengine.config import read_base\n\nwith read_base():\n'
        '    from mmseg_volo.configs.volo_d4_cityscapes import *\n\nmodel.backbone.update(drop_path_rate=0.25)\n'
    )
    mine, shipped = (flat(Config.fromfile(path).to_dict()) for path in (mine, CONFIGS / 'volo_d4_cityscapes.py'))
    assert mine.pop('model.backbone.drop_path_rate') == 0.25 and shipped.pop('model.backbone.drop_path_rate') == 0.5
    assert mine == shipped


@pytest.mark.parametrize('leaf', LEAVES)
def test_leaf_builds_and_its_parts_fit(leaf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that relative paths would fail
    cfg, model = build(leaf)
    backbone = model.backbone
    assert (type(backbone), backbone.arch) == backbone_of(leaf)
    assert cfg.model.backbone.img_size == cfg.crop_size
    if isinstance(backbone, CoAtNet):
        check_coatnet(leaf, backbone, model)
        widths = backbone.out_channels
        assert not model.with_neck and backbone.out_strides == [4, 8, 16, 32]
    else:
        check_volo_and_hvt(leaf, backbone, cfg.crop_size)
        widths, scales = [cfg.model.neck.out_channels] * 4, cfg.model.neck.scales
        assert backbone.out_channels == list(cfg.model.neck.in_channels)
        assert [s / r for s, r in zip(backbone.out_strides, scales, strict=True)] == [4, 8, 16, 32]
    assert list(model.decode_head.in_channels) == widths
    if model.with_auxiliary_head:
        assert model.auxiliary_head.in_channels == widths[model.auxiliary_head.in_index]
    dataset = DATASETS.get(cfg.train_dataloader.dataset.type)
    heads = [model.decode_head] + ([model.auxiliary_head] if model.with_auxiliary_head else [])
    for head in heads:
        assert head.num_classes == len(dataset.METAINFO['classes'])
    assert model.data_preprocessor.size == tuple(cfg.crop_size)
    images, per = map(int, re.match(r'.*: (\d+) \w+ x (\d+) images', (CONFIGS / leaf).read_text()).groups())
    assert cfg.train_dataloader.batch_size == per
    if 'auto_scale_lr' in cfg:
        assert cfg.auto_scale_lr.base_batch_size == images * per and not cfg.auto_scale_lr.enable


def check_volo_and_hvt(leaf: str, backbone: VOLO | HVT, crop_size: tuple[int, int]) -> None:
    stride = 16 if isinstance(backbone, VOLO) else 8
    assert backbone.pos_embed.shape[1:3] == tuple(-(-side // stride) for side in crop_size)
    if isinstance(backbone, VOLO) and backbone.arch != 'tiny' and 'camvid' not in leaf:
        assert re.fullmatch(rf'timm://volo_{backbone.arch}_\d+\.sail_in1k', backbone.init_cfg['checkpoint'])


def check_coatnet(leaf: str, backbone: CoAtNet, model: torch.nn.Module) -> None:
    if backbone.arch != 'tiny':
        assert re.fullmatch(rf'timm://coatnet_{backbone.arch}_\d+\.sw_in\w+', backbone.init_cfg['checkpoint'])
        assert backbone.init_cfg['checkpoint'].removeprefix('timm://') in timm.list_pretrained('coatnet_*')
    settings = load(leaf).model.data_preprocessor
    assert list(settings.mean) == list(settings['std']) == [127.5] * 3
    assert 'ours' in (CONFIGS / leaf).read_text().splitlines()[1]


@pytest.mark.parametrize('leaf', LEAVES)
def test_upstream_types_are_strings(leaf):
    types = upstream_types(load(leaf)._cfg_dict)
    assert len(types) > 20
    ours = [t for t in types if not isinstance(t, str)]
    assert all(t.__module__.startswith('mmseg_volo') for t in ours) and backbone_of(leaf)[0] in ours


@pytest.mark.parametrize('leaf', LEAVES)
def test_test_setup_equals_validation(leaf):
    cfg = load(leaf)
    val, test = cfg.val_dataloader.to_dict(), cfg.test_dataloader.to_dict()
    if 'camvid' in leaf:  # the only data set with a labelled test split
        assert test['dataset'].pop('data_prefix') != val['dataset'].pop('data_prefix')
    assert val == test and cfg.val_evaluator == cfg.test_evaluator


@pytest.mark.parametrize(
    'leaf',
    [
        *('volo_d1_ade20k.py', 'volo_d5_ade20k_layer_decay.py', 'volo_tiny_camvid.py', 'hvt_tiny_camvid.py'),
        *('coatnet_tiny_camvid.py', *COATNETS),
    ],
)
def test_norms_and_positions_are_not_decayed(leaf, tmp_path):
    cfg = load(leaf)
    backbone, arch = backbone_of(leaf)
    cfg.model.backbone.update(init_cfg=None)
    if backbone is VOLO:
        cfg.model.backbone.arch = 'tiny'
        cfg.model.neck.in_channels = [64, 128, 128, 128]
    elif backbone is CoAtNet:
        cfg.model.backbone.arch = {**COATNET_ARCHITECTURES[arch], 'depths': (1, 1, 1, 1)}
    runner = Runner(cfg.model, work_dir=str(tmp_path), default_scope='mmseg', experiment_name=leaf + str(os.getpid()))
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    names = dict(runner.model.named_parameters())
    assert set(decay) == {id(p) for p in names.values()}
    norms = {
        f'{name}.{kind}'
        for name, module in runner.model.named_modules()
        if isinstance(module, torch.nn.LayerNorm | torch.nn.modules.batchnorm._BatchNorm)
        for kind in ('weight', 'bias')
    }
    first = {f'backbone.{name}.weight' for name in ('patch_embed.conv.1', 'stem.norm1', 'blocks.0.norm1')}
    assert first & norms
    assert any(re.search(POSITIONS, name) for name in names)
    for name, parameter in names.items():
        if name in norms or re.search(POSITIONS, name) or name.endswith('.gamma'):
            assert decay[id(parameter)] == 0, name
        elif name.endswith('.weight'):
            assert decay[id(parameter)] > 0, name


@pytest.mark.parametrize('leaf', [leaf for leaf in GRID if not leaf.startswith('volo_d1')])
def test_larger_models_differ_from_d1_in_what_depends_on_the_size(leaf):
    cfg, d1 = load(leaf).to_dict(), load(re.sub('d[2-5]', 'd1', leaf)).to_dict()
    for config in (cfg, d1):
        backbone = config['model']['backbone']
        varying = [backbone.pop('arch'), backbone.pop('drop_path_rate'), backbone.pop('init_cfg')['checkpoint']]
        varying += [backbone.pop('with_cp', False), config['model']['neck'].pop('in_channels')]
    assert cfg == d1 and varying[:2] == ['d1', 0.1]


def test_configs_are_found_where_the_readme_says():
    readme = (ROOT / 'README.md').read_text()
    for name in re.findall(r'configs/([\w.]+\.py)', readme):
        assert (Path(CONFIGS) / name).is_file(), name


@pytest.mark.parametrize('name', ['resnet50_camvid', 'swin_t_camvid'])
def test_baselines_differ_from_volo_d1_in_the_backbone_alone(name):
    cfg = load(f'baselines/{name}.py')
    init_default_scope('mmseg')
    model = MODELS.build(copy.deepcopy(cfg.model))
    ours = load('volo_d1_camvid.py')
    assert not isinstance(model.backbone, VOLO) and not model.with_neck
    for key in ('train_dataloader', 'test_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg'):
        assert cfg[key] == ours[key], key
    assert cfg.model.decode_head.channels == ours.model.decode_head.get('channels')
    with torch.no_grad():
        outputs = model.eval().backbone(torch.zeros(1, 3, 64, 64))
    assert [y.shape[1] for y in outputs] == list(model.decode_head.in_channels)


def test_the_sharded_config_differs_from_its_leaf_in_batch_size_and_runner():
    names = 'sharded/volo_d5_cityscapes_fsdp.py', 'volo_d5_cityscapes.py'
    cfg, leaf = (load(name).to_dict() for name in names)  # to_dict() resolves mmengine's lazy objects
    assert {key for key in cfg if cfg[key] != leaf.get(key)} == {'train_dataloader', 'runner_type'}
    batch_size = cfg['train_dataloader']['batch_size']
    assert 8 * batch_size == cfg['auto_scale_lr']['base_batch_size']
    assert cfg['train_dataloader'] == dict(leaf['train_dataloader'], batch_size=batch_size)


def test_the_hooks_on_the_page_about_training_can_be_added_to_a_leaf(tmp_path):
    page = (ROOT / 'docs/training.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    (tmp_path / 'mine.py').write_text('\n'.join(blocks))
    hooks = [HOOKS.build(hook) for hook in Config.fromfile(tmp_path / 'mine.py').custom_hooks]
    assert [type(hook) for hook in hooks[-2:]] == [DurableEarlyStoppingHook, EMAHook] and len(hooks) == 5
