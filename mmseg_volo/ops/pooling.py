"""Adaptive average pooling as a product with matrices."""

import torch
from torch import Tensor


def adaptive_avg_pool(x: Tensor, size: tuple[int, int] | int) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d``, which torch.export can record for every size of the map.

    Args:
        x: ``[B, C, H, W]``.
        size: height and width of the result, or one number for both.

    Returns:
        ``[B, C, *size]``.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = _means(x.shape[2], height, x), _means(x.shape[3], width, x)
    return rows @ x @ columns.t()


def _means(source: int, target: int, like: Tensor) -> Tensor:
    """``[target, source]``: row i averages the positions from floor(i s / t) to ceil((i + 1) s / t)."""
    i = torch.arange(target, device=like.device)[:, None]
    position = torch.arange(source, device=like.device)
    begin, end = i * source // target, ((i + 1) * source + target - 1) // target
    inside = (position >= begin) & (position < end)
    return inside.to(like.dtype) / (end - begin).to(like.dtype)
