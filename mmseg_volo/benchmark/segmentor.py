"""Segmentors with random weights and images, for the benchmarks."""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..config import load_config


def build_segmentor(config: str, device: str, cfg_options: dict | None = None) -> tuple[Config, nn.Module]:
    """Config and its model with random weights, in training mode."""
    cfg = load_config(config, cfg_options or {})
    init_default_scope('mmseg')
    cfg.model.backbone.pop('init_cfg', None)
    return cfg, MODELS.build(cfg.model).to(device).train()


def random_batch(cfg: Config, model: nn.Module, batch: int, device: str) -> tuple[Tensor, list[SegDataSample]]:
    """Random images ``[batch, 3, H, W]`` in the config's crop size, and their labels."""
    height, width = cfg.crop_size
    labels = torch.randint(model.num_classes, (batch, 1, height, width), device=device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in labels]
    return torch.randn(batch, 3, height, width, device=device), samples


def autocast(device: str) -> AbstractContextManager:
    """bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast('cuda', torch.bfloat16) if device == 'cuda' else nullcontext()


def segmentor_speed(config: str, device: str, rounds: int = 5) -> dict:
    """Measure step time and images per second; on a GPU also peak memory and the largest batch that fits.

    The hours on 8 devices are computed from images per second, without communication.
    """
    cfg, model = build_segmentor(config, device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: int) -> float:
        images, samples = random_batch(cfg, model, batch, device)
        start = _now(device)
        with autocast(device):
            losses = model(images, samples, mode='loss')
        sum(value for key, value in losses.items() if 'loss' in key).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _now(device) - start

    batch = cfg.train_dataloader.batch_size
    step(batch)
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step(batch) for _ in range(rounds))
    images = cfg.train_cfg.max_iters * cfg.get('auto_scale_lr', {}).get('base_batch_size', batch)
    row = {
        'config': Path(config).stem,
        'batch': batch,
        'step, s': round(seconds, 4),
        'images/s': round(batch / seconds, 2),
        'hours on 8': round(images / (8 * batch / seconds) / 3600, 3),
    }
    if device == 'cuda':
        row['peak, GiB'] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        row['largest batch'] = largest_batch(step, batch)
    return row


def largest_batch(step, start: int) -> int:
    """Largest batch for which ``step(batch)`` does not run out of device memory; doubled, then bisected."""
    fits, fails = 0, None
    batch = start
    while fails is None or fails - fits > 1:
        try:
            step(batch)
            fits = batch
        except torch.OutOfMemoryError:
            fails = batch
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batch = 2 * fits if fails is None else (fits + fails) // 2
    return fits


def _now(device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()
