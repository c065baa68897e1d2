"""Time and memory of sliding-window inference, compared with mmseg and over growing images."""

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from prettytable import PrettyTable
from torch import nn

from .._device import resolve_device
from ..errors import UserError
from ..models.segmentor import SlidingSegmentor
from .memory import peak_bytes
from .segmentor import autocast, build_segmentor
from .timing import environment, paired_times

AGAINST_MMSEG = (1024, 2048)
TOLERANCE = 1e-5


def benchmark_sliding(
    config: str,
    sizes: Sequence[int] = (2048, 4096, 8192, 16384),
    crop: int = 512,
    stride: int = 384,
    device: str = 'auto',
    cfg_options: dict | None = None,
) -> dict[str, list[dict]]:
    """Compare sliding-window inference with mmseg's, and measure it on growing images; print and return both tables.

    Raises:
        UserError: device or sizes are unusable, or the model is no ``SlidingSegmentor`` or differs from mmseg's.
    """
    if min(sizes) < 1:
        raise UserError(f'--sizes must be at least 1, got {min(sizes)}')
    device = resolve_device(device)
    torch.manual_seed(0)
    cfg, _ = build_segmentor(config, 'cpu', cfg_options)
    if cfg.model.type is not SlidingSegmentor:
        raise UserError(f'model.type must be SlidingSegmentor, but {config} has {cfg.model.type}')
    cfg.model.test_cfg = dict(mode='slide', crop_size=(crop, crop), stride=(stride, stride))
    ours = MODELS.build(cfg.model).to(device).eval()
    theirs = MODELS.build(dict(copy.deepcopy(cfg.model), type='EncoderDecoder')).to(device).eval()
    theirs.load_state_dict(ours.state_dict())
    print('\n'.join(f'{key}: {value}' for key, value in environment(device).items()))
    print(f'{config}, {ours.out_channels} classes, {crop} x {crop} windows with a stride of {stride}')
    against = [_against_mmseg(ours, theirs, device)]
    _print(against, 'one image, compared with mmseg')
    growing = [_growing(ours, size, device) for size in sizes]
    _print(growing, 'growing images; memory without image and labels')
    return dict(against=against, growing=growing)


def _against_mmseg(ours: nn.Module, theirs: nn.Module, device: str) -> dict:
    image = _image(*AGAINST_MMSEG)
    sample = SegDataSample(metainfo=dict(ori_shape=AGAINST_MMSEG, img_shape=AGAINST_MMSEG))

    def run(model):
        with torch.no_grad(), autocast(device):
            return model.test_step(dict(inputs=[image], data_samples=[sample.clone()]))[0]

    with torch.no_grad():  # in float32
        exact = theirs.test_step(dict(inputs=[image], data_samples=[sample.clone()]))[0].seg_logits.data
        error = (ours.segment(image, AGAINST_MMSEG, logits=True).to(exact) - exact).abs().max().item()
    if not error <= TOLERANCE:
        raise UserError(f"logits differ from mmseg's by {error:.1e}, more than {TOLERANCE}, so nothing is timed")
    runs = dict(ours=lambda: run(ours), mmseg=lambda: run(theirs))
    times = paired_times(runs, 3, device)
    ratios = [slow / fast for slow, fast in zip(times['mmseg'], times['ours'], strict=True)]
    peaks = {name: peak_bytes(one, device) for name, one in runs.items()}
    return {
        'image': 'x'.join(map(str, AGAINST_MMSEG)),
        'largest error': f'{error:.1e}',
        'ours, s': round(statistics.median(times['ours']), 2),
        'mmseg, s': round(statistics.median(times['mmseg']), 2),
        'ratio': f'{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})',
        'ours, MiB': peaks['ours'] >> 20,
        'mmseg, MiB': peaks['mmseg'] >> 20,
    }


def _growing(model: nn.Module, size: int, device: str) -> dict:
    image, seconds = _image(size, size), []

    def run():
        start = time.perf_counter()
        with autocast(device):
            model.segment(image, (size, size))
        seconds.append(time.perf_counter() - start)

    peak = peak_bytes(run, device) - (0 if device == 'cuda' else size * size)
    return {
        'image': f'{size}x{size}',
        's': round(seconds[0], 1),
        's per megapixel': round(seconds[0] / size**2 * 1e6, 2),
        'MiB': peak >> 20,
        'MiB per 1000 columns': round((peak >> 20) / size * 1e3, 1),
        'full logits, MiB': model.out_channels * size**2 * 4 >> 20,
    }


def _image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _print(rows: list[dict], title: str) -> None:
    table = PrettyTable(list(rows[0]), title=title, align='r')
    table.add_rows([list(row.values()) for row in rows])
    print(table, flush=True)
