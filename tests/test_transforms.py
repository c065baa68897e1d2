"""Transforms give mmseg's pixels, and leave the random numbers where mmseg's leave them."""

import numpy as np
import pytest
from mmseg.datasets.transforms import PhotoMetricDistortion as MmsegPhotoMetricDistortion
from mmseg.datasets.transforms import RandomCrop as MmsegRandomCrop

from mmseg_volo.datasets.transforms import PhotoMetricDistortion, RandomCrop


def same(ours, theirs, results: dict, seed: int) -> dict:
    """The result of both transforms, which must be equal."""
    found = []
    for transform in (ours, theirs):
        np.random.seed(seed)
        copy = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in results.items()}
        found.append((transform.transform(copy), np.random.random()))
    (mine, next_mine), (expected, next_expected) = found
    assert next_mine == next_expected and mine.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(mine[key], value), key
        assert getattr(mine[key], 'dtype', None) == getattr(value, 'dtype', None)
    return mine


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_colours_equal_mmsegs_for_every_pixel(dtype):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (61, 83, 3)).astype(dtype)
    if dtype == np.float32:
        image = image / 255  # mmcv's conversion expects 0 to 1
    changed = 0
    for seed in range(60):
        settings = dict(brightness_delta=60, contrast_range=(0.2, 2.5), saturation_range=(0, 3), hue_delta=90)
        result = same(PhotoMetricDistortion(**settings), MmsegPhotoMetricDistortion(**settings), dict(img=image), seed)
        changed += not np.array_equal(result['img'], image)
    assert changed > 40


@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
@pytest.mark.parametrize('ratio', [0.4, 0.75, 1.0])
def test_crops_equal_mmsegs(ratio, dtype):
    generator = np.random.default_rng(0)
    labels = np.kron(generator.integers(0, 4, (6, 8)), np.ones((16, 16))).astype(dtype)
    labels[:20] = 255
    image = generator.integers(0, 256, (96, 128, 3), np.uint8)
    results = dict(img=image, gt_seg_map=labels, seg_fields=['gt_seg_map'])
    boxes = set()
    for seed in range(40):
        arguments = (40, 50), ratio
        found = same(RandomCrop(*arguments), MmsegRandomCrop(*arguments), results, seed)
        assert found['img'].shape == (40, 50, 3)
        boxes.add(found['img'].tobytes())
    assert len(boxes) > 20


def test_an_image_smaller_than_the_crop_stays_whole():
    results = dict(img=np.zeros((20, 30, 3), np.uint8), gt_seg_map=np.zeros((20, 30), np.uint8))
    found = same(RandomCrop((40, 50), 0.75), MmsegRandomCrop((40, 50), 0.75), results, 0)
    assert found['img'].shape == (20, 30, 3)
