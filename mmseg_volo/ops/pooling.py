"""Adaptive average pooling as a product with matrices."""

from functools import lru_cache

import torch
from torch import Tensor

from .sizes import is_exporting


def adaptive_avg_pool(x: Tensor, size: tuple[int, int] | int) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d``, which torch.export can record for every size of the map.

    Args:
        x: ``[B, C, H, W]``.
        size: height and width of the result, or one number for both.

    Returns:
        ``[B, C, *size]``.
    """
    height, width = (size, size) if isinstance(size, int) else size
    kept = type(x) is Tensor and not (is_exporting() or torch.compiler.is_compiling())
    means = _kept_means if kept else _means
    rows, columns = means(x.shape[2], height, x.dtype, x.device), means(x.shape[3], width, x.dtype, x.device)
    return rows @ x @ columns.t()


def _means(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[target, source]``: row i averages the positions from floor(i s / t) to ceil((i + 1) s / t)."""
    i = torch.arange(target, device=device)[:, None]
    position = torch.arange(source, device=device)
    begin, end = i * source // target, ((i + 1) * source + target - 1) // target
    inside = (position >= begin) & (position < end)
    return inside.to(dtype) / (end - begin).to(dtype)


@lru_cache(256)
def _kept_means(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _means(source, target, dtype, device)
