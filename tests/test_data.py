"""Data sets: their classes, and real images where they are available."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from PIL import Image

from mmseg_volo import CamVidDataset
from mmseg_volo.config import load_config
from mmseg_volo.datasets.checks import check_data
from mmseg_volo.errors import UserError


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def small_camvid(tmp_path):
    """CamVid's folders with random pixels."""
    for split in ('train', 'val', 'test'):
        for name in ('a', 'b'):
            write(tmp_path / f'images/{split}/{name}.jpg', np.random.randint(0, 255, (36, 48, 3), np.uint8))
            write(
                tmp_path / f'annotations/{split}/{name}.png',
                np.random.choice([0, 5, 10, 255], (36, 48)).astype(np.uint8),
            )
    return tmp_path


def test_camvid_has_eleven_classes_and_colours():
    meta = CamVidDataset.METAINFO
    assert len(meta['classes']) == len(meta['palette']) == len({tuple(c) for c in meta['palette']}) == 11
    assert meta['classes'][3] == 'road' and meta['palette'][3] == [128, 64, 128]


def test_camvid_reads_its_layout_from_any_root(small_camvid):
    cfg = load_config(str(ROOT / 'configs/volo_tiny_camvid.py'), {'data_root': str(small_camvid)})
    init_default_scope('mmseg')
    for split in ('train', 'val', 'test'):
        settings = cfg[f'{split}_dataloader'].dataset
        assert settings.data_root == str(small_camvid)
        dataset = DATASETS.build(settings)
        sample = dataset[0]
        assert len(dataset) == 2
        assert set(sample['data_samples'].gt_sem_seg.data.unique().tolist()) <= {0, 5, 10, 255}
    check_data(cfg, ('train', 'val', 'test'))


def test_a_train_crop_has_the_crop_size(small_camvid):
    cfg = load_config(str(ROOT / 'configs/volo_tiny_camvid.py'), {'data_root': str(small_camvid)})
    init_default_scope('mmseg')
    cfg.train_dataloader.dataset.pipeline[3].ratio_range = (1.0, 1.4)  # crops of smaller images would be smaller
    sample = DATASETS.build(cfg.train_dataloader.dataset)[0]
    assert sample['inputs'].shape[1:] == sample['data_samples'].gt_sem_seg.data.shape[1:] == (240, 320)


def test_real_camvid_passes_the_check(camvid):
    cfg = load_config(str(ROOT / 'configs/volo_tiny_camvid.py'), {'data_root': str(camvid)})
    check_data(cfg, ('train', 'val', 'test'))
    sizes = [len(DATASETS.build(cfg[f'{split}_dataloader'].dataset)) for split in ('train', 'val', 'test')]
    assert sizes == [367, 101, 233]


def test_real_ade20k_passes_the_check(ade20k):
    cfg = load_config(str(ROOT / 'configs/volo_d1_ade20k.py'), {'data_root': str(ade20k)})
    check_data(cfg, ('train', 'val'))


@pytest.mark.parametrize('reduced', [True, False])
def test_ade20k_counts_from_one_and_has_zero_for_void(tmp_path, reduced):
    for split in ('training', 'validation'):
        write(tmp_path / f'images/{split}/a.jpg', np.zeros((8, 8, 3), np.uint8))
        write(tmp_path / f'annotations/{split}/a.png', np.array([[0, 1], [149, 150]], np.uint8))
    cfg = load_config(str(ROOT / 'configs/volo_d1_ade20k.py'), {'data_root': str(tmp_path)})
    if reduced:
        check_data(cfg, ('train', 'val'))
    else:
        cfg.train_dataloader.dataset.reduce_zero_label = False
        cfg.train_dataloader.dataset.pipeline[2].reduce_zero_label = False
        with pytest.raises(UserError, match='id 150 in labels of 150 classes .* reduce_zero_label=True'):
            check_data(cfg, ('train',))


def test_a_real_image_goes_through_the_whole_ade20k_config(ade20k):
    cfg = load_config(str(ROOT / 'configs/volo_d1_ade20k.py'), {'data_root': str(ade20k)})
    init_default_scope('mmseg')
    cfg.model.backbone.update(arch='tiny', init_cfg=None)
    cfg.model.neck.in_channels = [64, 128, 128, 128]
    cfg.model.decode_head.channels = 32
    model = MODELS.build(cfg.model).eval()
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]
    with torch.no_grad():
        result = model.test_step(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))[0]
    assert result.pred_sem_seg.data.shape == result.gt_sem_seg.data.shape
    assert set(result.gt_sem_seg.data.unique().tolist()) <= {*range(150), 255}


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset'])
def test_data_root_and_the_check_reach_wrapped_data_sets(tmp_path, wrapper):
    base = Config.fromfile(ROOT / 'configs/volo_tiny_camvid.py')
    inner = base.train_dataloader.dataset
    base.train_dataloader.dataset = {
        'RepeatDataset': dict(type='RepeatDataset', times=2, dataset=inner),
        'ConcatDataset': dict(type='ConcatDataset', datasets=[inner, inner]),
    }[wrapper]
    base.dump(tmp_path / 'wrapped.py')
    cfg = load_config(str(tmp_path / 'wrapped.py'), {'data_root': '/elsewhere'})
    with pytest.raises(UserError, match='/elsewhere/images/train'):
        check_data(cfg, ('train',))
