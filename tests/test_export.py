"""Exported files: written, checked on the spot, and used in the place of checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from PIL import Image

from mmseg_volo.apis.exporting import export
from mmseg_volo.apis.inference import infer
from mmseg_volo.config import load_config
from mmseg_volo.datasets.toy_streets import make_toy_streets

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')

ARCH = dict(layers=(1, 1, 1, 1), embed_dims=(32, 48), num_heads=(1, 3), mlp_ratio=2, stem_channels=8)
SIZE = (96, 64)  # of the scenes, width and height
SLIDE = {'model.test_cfg': dict(mode='slide', crop_size=(48, 64), stride=(32, 48))}


@pytest.fixture(scope='session')
def place(tmp_path_factory) -> Path:
    """A folder with toy streets, a config and a checkpoint of a thin model for each head."""
    folder = tmp_path_factory.mktemp('export')
    make_toy_streets(folder / 'toy', train=3, val=2, size=SIZE)
    init_default_scope('mmseg')
    cfg = load_config('volo_tiny_toy_streets', dict(data_root=str(folder / 'toy')))
    cfg.model.backbone.update(arch=ARCH, img_size=(64, 64))
    cfg.model.neck.update(in_channels=[32, 48, 48, 48], out_channels=16)
    cfg.test_dataloader.dataset.pipeline[1].scale = SIZE
    upernet = dict(cfg.model.decode_head, in_channels=[16] * 4, channels=16)
    segformer = {key: value for key, value in upernet.items() if key != 'pool_scales'} | dict(type='SegformerHead')
    for name, head in dict(upernet=upernet, segformer=segformer).items():
        cfg.model.decode_head = head
        cfg.dump(folder / f'{name}.py')
        torch.manual_seed(0)
        model = MODELS.build(load_config(str(folder / f'{name}.py'), {}).model)
        torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
        meta = dict(dataset_meta=DATASETS.get('CityscapesDataset').METAINFO)
        torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / f'{name}.pth')
    return folder


def exported(place: Path, head: str) -> str:
    path = place / f'{head}.onnx'
    if not path.exists():
        export(str(place / f'{head}.py'), str(place / f'{head}.pth'), str(path))
    return str(path)


@pytest.fixture(scope='session', params=['upernet', 'segformer'])
def both(request, place) -> tuple[Path, str, str]:
    """Each head's config without its suffix, and its ONNX file."""
    return place / request.param, exported(place, request.param), request.param


@pytest.fixture(scope='session')
def file(place) -> str:
    """One ONNX file."""
    return exported(place, 'upernet')


def scenes(place: Path) -> list[str]:
    return sorted(str(path) for path in (place / 'toy/leftImg8bit/val').rglob('*.png'))


def labels(config: str, checkpoint: str, images: list[str], out: Path, **kwargs) -> list[np.ndarray]:
    infer(config, checkpoint, images, str(out), save=['labels'], **kwargs)
    return [np.asarray(Image.open(out / 'pred' / f'{Path(image).stem}.png')) for image in images]
