"""Pictures in, pictures out, one call."""

import glob
import os
import time
import warnings
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..models.weights import load_segmentor
from ..pictures import label_png, overlay, save_whole, with_legend
from .config import load_config, make_writable

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')


def infer(
    config: str,
    checkpoint: str,
    images: list[str],
    out_dir: str = 'out',
    device: str = 'auto',
    cfg_options: dict | None = None,
) -> list[str]:
    """Segment pictures: ``out_dir/vis`` gets overlays with a legend, ``out_dir/pred`` indexed label maps.

    Args:
        images: files, folders (their pictures, not those of subfolders) and glob patterns.
        device: ``'auto'`` takes a GPU if there is one.

    Returns:
        The files that could not be decoded, which were skipped with a warning.

    Raises:
        UserError: nothing to do, the only image cannot be decoded, or config, checkpoint or device cannot work.
    """
    outputs = _outputs(images)
    cfg = load_config(config, cfg_options or {})
    device = _device(device)
    model = _load_model(cfg, checkpoint, device)
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    out = make_writable(out_dir)
    skipped, start = [], time.perf_counter()
    for path, name in tqdm(outputs.items(), 'images', unit='image', disable=None):
        image = _decode(path)
        if image is None:
            if len(outputs) == 1:
                raise UserError(f'{path} cannot be decoded as an image')
            tqdm.write(f'warning: {path} cannot be decoded as an image; skipped')
            skipped.append(path)
            continue
        label = inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()
        picture = with_legend(overlay(image[..., ::-1], label, palette), label, classes, palette)
        try:
            save_whole(picture, out / 'vis' / f'{name}.png')
            save_whole(label_png(label, palette), out / 'pred' / f'{name}.png')
        except OSError as error:
            raise UserError(f'cannot write to {out} ({error.strerror}); what was written before is whole') from None
    done, seconds = len(outputs) - len(skipped), time.perf_counter() - start
    print(
        f'{done} of {len(outputs)} images segmented on {device} in {seconds:.1f} s: '
        f'overlays in {out / "vis"}, label maps in {out / "pred"}' + (f'; {len(skipped)} skipped' if skipped else '')
    )
    return skipped


def _outputs(images: list[str]) -> dict[str, str]:
    """Each input file and the name of its outputs: its stem, with as many folders before it as tell it from others."""
    files: list[str] = []
    for item in images:
        if os.path.isdir(item):
            found = sorted(str(p) for p in Path(item).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f'folder {item} has no images ({", ".join(IMAGE_SUFFIXES)})')
        elif os.path.isfile(item):
            found = [item]
        else:
            found = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
            if not found:
                raise UserError(f'no image, folder or pattern matches {item}')
        files += found
    files = list(dict.fromkeys(files))
    stems = [Path(file).stem for file in files]
    if len(set(stems)) == len(stems):
        return dict(zip(files, stems, strict=True))
    absolute = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(file) for file in absolute])
    names = [os.path.relpath(file, common) for file in absolute]
    stems = [os.path.splitext(name)[0] for name in names]  # a.jpg and a.png in one folder keep their suffixes
    return dict(zip(files, stems if len(set(stems)) == len(stems) else names, strict=True))


def _device(name: str) -> str:
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = 'torch finds no GPU' if not torch.cuda.is_available() else str(error).splitlines()[0]
        raise UserError(f'--device {name} cannot be used ({reason}); --device auto takes what there is') from None
    return name


def _load_model(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # without a checkpoint mmseg guesses class names; ours follow below
        model = init_model(cfg, checkpoint=None, device='cpu')
    meta = load_segmentor(model, checkpoint).get('dataset_meta')
    model.dataset_meta = meta or DATASETS.get(cfg.test_dataloader.dataset.type).METAINFO
    return model.to(device)


def _decode(path: str) -> np.ndarray | None:
    """Image as BGR, as mmseg's loader would give it, or None."""
    try:
        return mmcv.imread(path)
    except Exception:  # decoders raise as many kinds as there are damaged files
        return None
