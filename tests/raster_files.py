"""Small rasters and a small model for tests, and for the soak scripts."""

from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mmseg_volo.config import load_config

CLASSES, PALETTE = ['water', 'wood', 'field'], [[0, 0, 250], [0, 120, 0], [200, 200, 0]]
CONFIG = """
custom_imports = dict(imports=['mmseg_volo'])
default_scope = 'mmseg'
mean, std, loader = {mean}, {std}, dict(**{loader})
pipeline = [loader, dict(type='PackSegInputs')]
model = dict(
    type='SlidingSegmentor',
    data_preprocessor=dict(
        type='SegDataPreProcessor' if loader['type'] == 'LoadImageFromFile' else 'RasterDataPreProcessor',
        mean=mean, std=std, bgr_to_rgb=loader['type'] == 'LoadImageFromFile', size={crop},
    ),
    backbone=dict(
        type='VOLO', arch=dict(layers=(1, 1, 1, 1), embed_dims=(8, 16), num_heads=(1, 2), mlp_ratio=1, stem_channels=4),
        img_size=32, in_channels=len(mean), out_indices=[1],
    ),
    decode_head=dict(
        type='FCNHead', in_channels=16, in_index=0, channels=16, num_convs=0, concat_input=False, num_classes=3
    ),
    test_cfg=dict(mode='slide', crop_size={crop}, stride={stride}),
)
test_dataloader = dict(
    batch_size=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='BaseSegDataset', metainfo=dict(classes={classes}, palette={palette}), pipeline=pipeline),
)
"""


def write_config(
    path: Path,
    mean: list[float] = [100.0, 110.0, 120.0],  # noqa: B006
    loader: dict = dict(type='LoadImageFromFile'),  # noqa: B006
    crop: tuple[int, int] = (32, 48),
    stride: tuple[int, int] = (20, 32),
    more: str = '',
) -> str:
    """A config for pictures or rasters."""
    settings = dict(mean=mean, std=[50.0] * len(mean), loader=loader, crop=crop, stride=stride)
    path.write_text(CONFIG.format(**settings, classes=CLASSES, palette=PALETTE) + more)
    return str(path)


def write_checkpoint(path: Path, config: str, seed: int = 0) -> str:
    """Random weights that predict each class about equally often."""
    init_default_scope('mmseg')
    torch.manual_seed(seed)
    cfg = load_config(config, {})
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    image = torch.from_numpy(landscape(96, 96, len(cfg.mean), seed=9)) * torch.tensor(cfg.mean)[:, None, None] / 128
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=[image]))['inputs']
        logits = model.encode_decode(inputs, [dict(img_shape=inputs.shape[-2:])])
        model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=CLASSES, palette=PALETTE))), path
    )
    return str(path)


def landscape(height: int, width: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth noise, uint8 ``[bands, height, width]``."""
    noise = np.random.default_rng(seed).integers(0, 256, (bands, height // 8 + 2, width // 8 + 2), np.uint8)
    return np.stack([cv2.resize(band, (width, height), interpolation=cv2.INTER_CUBIC) for band in noise])


def write_raster(path: Path, values: np.ndarray, **profile: object) -> Path:
    """A TIFF of ``[bands, height, width]``, in EPSG:32633 by default."""
    import rasterio

    georeference = dict(crs='EPSG:32633', transform=rasterio.transform.from_origin(500000, 5000000, 10, 10))
    bands, height, width = values.shape
    settings = dict(driver='GTiff', width=width, height=height, count=bands, dtype=values.dtype)
    with rasterio.open(path, 'w', **settings, **(georeference | profile)) as file:
        file.write(values)
    return path
