"""Training that starts from another segmentor's weights, whose classes may be others."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmseg.datasets import CityscapesDataset
from mmseg.registry import HOOKS, MODELS
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmseg_volo.apis.push import push
from mmseg_volo.apis.training import train
from mmseg_volo.checkpoints.reading import read_checkpoint
from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets
from mmseg_volo.errors import UserError
from mmseg_volo.models.finetuning import SegmentorWeights
from mmseg_volo.models.pretrained import load_segmentor

CONFIG = str(ROOT / 'configs/volo_tiny_toy_streets.py')
CITYSCAPES = list(CityscapesDataset.METAINFO['classes'])
NAMES = ['sky', 'tree', 'road', 'car', 'person']
# Other capitals and separators, another order, two new names, and without 'person'.
OTHERS = ['Road', 'rider', 'C A R', 'van', 'sky_', 't-ree']
TAKEN = [2, None, 3, None, 0, 1]  # of OTHERS in NAMES
SHARED = dict(in_channels=48, in_index=0, channels=16, norm_cfg=dict(type='BN'), align_corners=False)


def head(kind: str = 'FCNHead', **settings) -> dict:
    return dict(type=kind, **SHARED, **settings)


AUXILIARY = {'model.auxiliary_head': [head(num_classes=0, num_convs=1), head(num_classes=0, num_convs=1)]}
OCRNET = {
    **AUXILIARY,
    'model.type': 'SlidingCascadeSegmentor',
    'model.num_stages': 2,
    'model.decode_head': [head(num_classes=0, num_convs=1), head('OCRHead', ocr_channels=8, num_classes=0)],
}
ENCNET = {
    'model.decode_head': head('EncHead', num_classes=0, num_codes=4, use_se_loss=True, _delete_=True)
    | dict(in_channels=[48], in_index=[0])
}
POINTREND = {
    'model.type': 'CascadeEncoderDecoder',
    'model.num_stages': 2,
    'model.decode_head': [
        head(num_classes=0, num_convs=1),
        dict(type='PointHead', in_channels=[48], in_index=[0], channels=8, num_fcs=2, num_classes=0),
    ],
    'model.test_cfg': dict(
        mode='whole', subdivision_steps=1, subdivision_num_points=64, scale_factor=2, num_points=64, oversample_ratio=3
    ),
}


def build(classes: int, seed: int = 0, **options) -> nn.Module:
    """A segmentor with random weights everywhere, in evaluation mode."""
    init_default_scope('mmseg')
    settings = load_config(CONFIG, copy.deepcopy(options)).model
    for name in ('decode_head', 'auxiliary_head'):
        heads = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for part in heads:
            if part:
                part.num_classes = classes
    torch.manual_seed(seed)
    model = MODELS.build(settings)
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def _mmcv_without_compiled_operators(monkeypatch):
    """PointHead needs one of them, which the package from PyPI lacks; this one is for points in a batch of maps."""

    def point_sample(x: Tensor, points: Tensor, align_corners: bool) -> Tensor:
        return F.grid_sample(x, 2 * points[:, None] - 1, align_corners=align_corners)[:, :, 0]

    monkeypatch.setattr('mmseg.models.decode_heads.point_head.point_sample', point_sample)


def save(model: nn.Module, classes: list[str] | None, path: Path) -> str:
    meta = {} if classes is None else dict(dataset_meta=dict(classes=tuple(classes)))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def logits(model: nn.Module) -> list[Tensor]:
    """Logits of all heads, decode heads first."""
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    meta = [dict(img_shape=(64, 96), ori_shape=(64, 96), pad_shape=(64, 96))]
    with torch.no_grad():
        features = model.extract_feat(image)
        auxiliary = model.auxiliary_head if model.with_auxiliary_head else []
        return [model.encode_decode(image, meta), *(part(features) for part in auxiliary)]


@pytest.mark.parametrize('settings', [AUXILIARY, OCRNET], ids=['auxiliary', 'cascade'])
def test_rows_go_where_the_names_of_their_classes_are(tmp_path, settings):
    source, target = build(len(NAMES), **settings), build(len(OTHERS), seed=1, **settings)
    fresh = build(len(OTHERS), seed=1, **settings)
    path = save(source, NAMES, tmp_path / 'x.pth')
    line = SegmentorWeights(path).load_into(target, OTHERS)
    assert line == f'4 of 6 classes taken from {path}; new: rider, van; dropped: person'
    classifiers = 0
    for key, value in target.state_dict().items():
        theirs, before = source.state_dict()[key], fresh.state_dict()[key]
        if 'conv_seg' not in key:
            assert torch.equal(value, theirs), key
            continue
        classifiers += 1
        for row, taken in enumerate(TAKEN):
            assert torch.equal(value[row], before[row] if taken is None else theirs[taken]), key
    assert classifiers == 2 * (3 if settings is AUXILIARY else 4)


@pytest.mark.parametrize('settings', [AUXILIARY, OCRNET, ENCNET, POINTREND], ids=['fcn', 'ocr', 'enc', 'pointrend'])
def test_permuted_classes_give_permuted_logits(tmp_path, settings):
    order = [3, 0, 4, 2, 1]
    source, target = build(5, **settings), build(5, seed=1, **settings)
    path = save(source, NAMES, tmp_path / 'x.pth')
    line = SegmentorWeights(path).load_into(target, [NAMES[i] for i in order])
    assert line == f'5 of 5 classes taken from {path}'
    for mine, theirs in zip(logits(target), logits(source), strict=True):
        if settings is ENCNET:
            assert torch.equal(mine, theirs[:, order])
        else:  # last bits depend on a channel's place, in OCRNet and PointRend also on the order of the classes
            atol = 1e-6 if settings is AUXILIARY else 1e-5
            torch.testing.assert_close(mine, theirs[:, order], rtol=0, atol=atol)
    if settings is ENCNET:
        assert torch.equal(target.decode_head.se_layer.bias, source.decode_head.se_layer.bias[order])


def test_the_columns_of_pointrend_go_with_the_classes(tmp_path):
    source, target, fresh = (build(n, seed, **POINTREND) for n, seed in ((5, 0), (6, 1), (6, 1)))
    SegmentorWeights(save(source, NAMES, tmp_path / 'x.pth')).load_into(target, OTHERS)
    mine, theirs, before = (model.decode_head[1] for model in (target, source, fresh))
    for name in ('fcs.0.conv.weight', 'fcs.1.conv.weight', 'fc_seg.weight'):
        new, old, initial = (part.get_parameter(name).squeeze(-1) for part in (mine, theirs, before))
        rows = TAKEN if name == 'fc_seg.weight' else range(len(new))
        for i, row in enumerate(rows):
            expected = initial[i].clone()
            if row is not None:
                expected[:-6] = old[row, :-5]
                for j, column in enumerate(TAKEN):
                    if column is not None:
                        expected[j - 6] = old[row, column - 5]
            assert torch.equal(new[i], expected), name


ONE_CHANNEL = {'model.decode_head.out_channels': 1, 'model.decode_head.loss_decode.use_sigmoid': True}


def test_one_channel_belongs_to_the_second_class(tmp_path):
    source = build(2, **ONE_CHANNEL)
    path = save(source, ['road', 'crack'], tmp_path / 'x.pth')
    same, swapped, more = build(2, 1, **ONE_CHANNEL), build(2, 1, **ONE_CHANNEL), build(3, 1)
    before = swapped.decode_head.conv_seg.weight.clone()
    weight = source.decode_head.conv_seg.weight
    assert SegmentorWeights(path).load_into(same, ['wall', 'crack']) == f'1 of 1 classes taken from {path}'
    assert torch.equal(same.decode_head.conv_seg.weight, weight)
    line = SegmentorWeights(path).load_into(swapped, ['crack', 'road'])
    assert line == f'0 of 1 classes taken from {path}; new: road; dropped: crack'
    assert torch.equal(swapped.decode_head.conv_seg.weight, before)
    SegmentorWeights(path).load_into(more, ['a', 'b', 'Crack'])
    assert torch.equal(more.decode_head.conv_seg.weight[2], weight[0])
    with pytest.raises(UserError, match=r'decode_head\.conv_seg\.bias of .*x\.pth has 1 rows for 3 classes'):
        SegmentorWeights(save(source, ['a', 'b', 'c'], tmp_path / 'x.pth')).load_into(more, ['a', 'b', 'c'])


def test_an_equal_name_goes_before_a_similar_one(tmp_path):
    source, target = build(3), build(2, 1)
    SegmentorWeights(save(source, ['Car', 'car', 'CAR'], tmp_path / 'x.pth')).load_into(target, ['car', 'c_a_r'])
    assert torch.equal(target.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight[[1, 0]])


def test_another_image_size_and_other_channels_are_adapted_as_imagenet_weights_are(tmp_path):
    grey = dict(mean=[0.0], std=[1.0], bgr_to_rgb=False)
    options = {'model.backbone.img_size': (64, 96), 'model.backbone.in_channels': 1}
    options |= {f'model.data_preprocessor.{key}': value for key, value in grey.items()}
    source, target = build(5), build(5, 1, **options)
    line = SegmentorWeights(save(source, NAMES, tmp_path / 'x.pth')).load_into(target, NAMES)
    assert line.endswith('; pos_embed resized from 6x12 to 4x6; stem adapted from 3 to 1 channels')


def test_heads_whose_classes_have_no_rows_need_the_same_classes(tmp_path):
    segmenter = {
        'model.decode_head': dict(
            type='SegmenterMaskTransformerHead', in_channels=48, in_index=0, channels=16, num_layers=1, num_heads=2,
            embed_dims=16, num_classes=0, _delete_=True,
        )
    }  # fmt: skip
    source, target = build(5, **segmenter), build(5, 1, **segmenter)
    weights = SegmentorWeights(save(source, NAMES, tmp_path / 'x.pth'))
    weights.load_into(target, [name.upper() for name in NAMES])
    assert torch.equal(target.decode_head.cls_emb, source.decode_head.cls_emb)
    with pytest.raises(UserError, match='decode_head is a SegmenterMaskTransformerHead, whose classes cannot be match'):
        weights.load_into(target, NAMES[::-1])


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(tmp_path):
    weights = SegmentorWeights(save(build(5), NAMES, tmp_path / 'x.pth'))
    for options, message in (
        (
            {'model.decode_head.channels': 32},
            r'of another shape \(decode_head\.conv_seg\.weight is \[5, 48, 1, 1\] inst',
        ),
        (AUXILIARY, r'x\.pth does not fit the model of this config: 28 missing \(auxiliary_head\.0\.'),
        ({'model.backbone.arch': 'd1'}, r'missing \(.* of another shape \(backbone\.pos_embed'),
    ):
        target = build(5, 1, **options)
        before = {key: value.clone() for key, value in target.state_dict().items()}
        with pytest.raises(UserError, match=message):
            weights.load_into(target, NAMES)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_classes_that_a_checkpoint_does_not_name_are_taken_by_position_when_asked(tmp_path):
    source = build(5)
    path = tmp_path / 'x.safetensors'
    save_file(source.state_dict(), path)
    with pytest.raises(UserError, match=r'x\.safetensors does not name its classes; .* add --same-classes'):
        SegmentorWeights(str(path))
    target = build(5, 1)
    assert SegmentorWeights(str(path), same_classes=True).load_into(target, NAMES).startswith('5 of 5 classes')
    assert torch.equal(target.decode_head.conv_seg.weight, source.decode_head.conv_seg.weight)
    with pytest.raises(UserError, match=r'conv_seg\.\w+ of .*x\.safetensors has 5 rows for 6 classes'):
        SegmentorWeights(str(path), same_classes=True).load_into(build(6), OTHERS)


def test_a_pushed_model_names_its_classes(tmp_path):
    path = save(build(19), None, tmp_path / 'x.pth')
    push(CONFIG, path, str(tmp_path / 'pushed'))
    weights = SegmentorWeights(str(tmp_path / 'pushed'))
    assert weights.classes == CITYSCAPES
    with pytest.raises(UserError, match='checkpoint not found'):
        SegmentorWeights(str(tmp_path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = build(5)
    model.decode_head.conv_seg.bias.data[0] = float('nan')
    with pytest.raises(UserError, match=r'x\.pth is refused: 1 of its tensors contain NaN or infinity'):
        SegmentorWeights(save(model, NAMES, tmp_path / 'x.pth'))


@pytest.mark.parametrize('meta', [dict(CLASSES=NAMES), dict(CLASSES=tuple(NAMES), dataset_meta=None)])
def test_names_are_read_where_mmseg_0_wrote_them(tmp_path, meta):
    torch.save(dict(state_dict=build(5).state_dict(), meta=meta), tmp_path / 'x.pth')
    assert SegmentorWeights(str(tmp_path / 'x.pth')).classes == NAMES


@pytest.mark.parametrize('meta', [3, dict(dataset_meta=dict(classes='abcde')), dict(CLASSES=[1, 2, 3, 4, 5])])
def test_names_of_another_form_are_none(tmp_path, meta):
    torch.save(dict(state_dict=build(5).state_dict(), meta=meta), tmp_path / 'x.pth')
    with pytest.raises(UserError, match='does not name its classes'):
        SegmentorWeights(str(tmp_path / 'x.pth'))


# Whole runs


@HOOKS.register_module()
class KeepStartHook(Hook):
    """Keep the weights from before and after ``--finetune``."""

    priority = 'HIGHEST'
    initial: dict
    state: dict

    def before_train(self, runner):
        KeepStartHook.initial = copy.deepcopy(runner.model.state_dict())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            KeepStartHook.state = copy.deepcopy(runner.model.state_dict())


@pytest.fixture(scope='module')
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('toy')
    make_toy_streets(folder, train=4, val=2, size=(96, 64))
    return folder


def run(toy: Path, work_dir: Path, *hooks: dict, max_iters: int = 2, options: dict | None = None, **settings):
    loaders = {
        f'{split}_dataloader.{key}': value
        for split in ('train', 'val', 'test')
        if f'{split}_dataloader' not in (options or {})
        for key, value in dict(num_workers=0, persistent_workers=False).items()
    }
    everything = {
        'data_root': str(toy),
        'train_cfg.max_iters': max_iters,
        'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 1,
        'train_dataloader.batch_size': 2,
        'visualizer.vis_backends': [dict(type='LocalVisBackend')],
        'custom_hooks': [dict(type='KeepStartHook'), *hooks],
        **loaders,
        **(options or {}),
    }
    return train(CONFIG, str(work_dir), cfg_options=everything, seed=0, **settings)


@pytest.fixture(scope='module')
def source(toy, tmp_path_factory) -> str:
    """A checkpoint of a run that averages its weights."""
    work_dir = tmp_path_factory.mktemp('source')
    run(toy, work_dir, dict(type='EMAHook', momentum=0.3))
    return str(work_dir / 'iter_2.pth')


def test_a_run_with_the_same_classes_starts_with_the_logits_of_the_averaged_weights(toy, source, tmp_path, capsys):
    nowhere = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint='nowhere.pth')}
    run(toy, tmp_path, dict(type='EMAHook'), max_iters=1, options=nowhere, finetune=source)
    assert f'19 of 19 classes taken from {source}\n' in capsys.readouterr().out
    models = [build(len(CITYSCAPES)) for _ in range(2)]
    models[0].load_state_dict(KeepStartHook.state)
    load_segmentor(models[1], source)
    assert torch.equal(*(logits(model)[0] for model in models))
    contents = read_checkpoint(source)
    key = 'decode_head.conv_seg.weight'
    assert not torch.equal(contents['state_dict'][key], contents['ema_state_dict']['module.' + key])
    first = read_checkpoint(tmp_path / 'iter_1.pth')
    assert not torch.equal(first['ema_state_dict']['module.' + key], contents['state_dict'][key])  # it was trained
    assert first['optimizer']['state'][0]['step'] == 1


def test_new_rows_stay_as_the_config_initialises_them(toy, source, tmp_path):
    classes = [*CITYSCAPES[:-2], 'van', 'rail']
    settings = dict(
        type='BaseSegDataset',
        metainfo=dict(classes=classes),
        img_suffix='_leftImg8bit.png',
        seg_map_suffix='_gtFine_labelTrainIds.png',
    )
    options = {f'train_dataloader.dataset.{key}': value for key, value in settings.items()}
    options |= dict.fromkeys(('val_dataloader', 'val_cfg', 'val_evaluator'))
    run(toy, tmp_path, max_iters=1, options=options, finetune=source)
    theirs, initial, state = read_checkpoint(source)['state_dict'], KeepStartHook.initial, KeepStartHook.state
    for part in ('weight', 'bias'):
        key = f'decode_head.conv_seg.{part}'
        assert torch.equal(state[key], torch.cat([theirs[key][:17], initial[key][17:]]))


def test_a_restarted_run_goes_on_from_its_own_checkpoint(toy, source, tmp_path, capsys):
    run(toy, tmp_path, max_iters=1, finetune=source, resume='auto')
    assert '19 of 19 classes taken' in capsys.readouterr().out
    run(toy, tmp_path, max_iters=2, finetune='deleted.pth', resume='auto')
    assert f'resuming from {tmp_path}/iter_1.pth' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(finetune='nowhere.pth'), 'checkpoint not found: nowhere.pth'),
        (dict(finetune=''), 'checkpoint not found'),
        (dict(finetune='x.pth', resume='y.pth'), '--finetune x.pth and --resume y.pth name two checkpoints'),
        (dict(finetune='x.pth', options={'load_from': 'y.pth'}), "--finetune x.pth and load_from='y.pth' name two"),
        (dict(same_classes=True), '--same-classes says how to read the checkpoint of --finetune, which is missing'),
    ],
)
def test_a_start_that_is_no_start_is_a_mistake(toy, tmp_path, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(toy, tmp_path, **settings)


def test_weights_of_a_backbone_alone_are_no_segmentor(tmp_path):
    torch.save(build(5).backbone.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(UserError, match=r'has no decode head, .* model\.backbone\.init_cfg\.checkpoint='):
        SegmentorWeights(str(tmp_path / 'x.pth'))
