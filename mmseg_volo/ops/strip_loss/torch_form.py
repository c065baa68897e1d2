"""Loss and gradient in PyTorch, for every device and dtype."""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..resized_maps.taps import both_axes
from .taps import taps

# Bytes of scores at a time: on a CPU they should stay in the cache, on a GPU few kernels should do much work.
STRIP = {'cpu': 2**21, 'cuda': 2**27}


def why_not(scores: Tensor) -> None:
    """Return None: every device and dtype is supported."""


def compute(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of the losses, number of correct pixels, and the gradient of the sum, ``[B, K, h, w]`` in scores' dtype."""
    B, K, h, w = scores.shape
    H, W = labels.shape[1:]
    dtype = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    top, bottom, share = _taps(h, H, align_corners, scores.device, dtype)
    total, correct = scores.new_zeros((), dtype=dtype), torch.zeros((), dtype=torch.int64, device=scores.device)
    gradient = torch.zeros(scores.shape, dtype=dtype, device=scores.device) if need_gradient else None
    if gradient is not None:
        # PyTorch's own gradient of a resize adds in random order on a GPU; products with its matrices do not.
        (down,), (right,) = both_axes((h, w), (H, W), 1, align_corners, gradient)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
    for images, rows in _strips(B, H, K * W * dtype.itemsize, scores.device.type):
        low = scores[images].to(dtype)
        tall = torch.lerp(low[:, :, top[rows]], low[:, :, bottom[rows]], share[rows, None])  # n, K, rows, w
        high = F.interpolate(tall, (tall.shape[2], W), mode='bilinear', align_corners=align_corners)
        target = labels[images, rows]
        valid = target != ignore_index
        index = torch.where(valid, target, 0)[:, None]
        log = torch.log_softmax(high, 1)
        own = log.gather(1, index)[:, 0]
        weight = valid.to(dtype) if class_weight is None else class_weight[index[:, 0]] * valid
        total -= (torch.where(valid, own, 0) * weight).sum()
        correct += ((own >= log.amax(1)) & valid).sum()
        if gradient is not None:
            high = log.exp_().scatter_add_(1, index, torch.full_like(own, -1)[:, None]).mul_(weight[:, None])
            gradient[images] += down[rows].t() @ (high @ right)
    return total, correct, None if gradient is None else gradient.to(scores.dtype)


_taps = lru_cache(64)(taps)


def _strips(B: int, H: int, bytes_of_a_row: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Images and rows to process together; several images only if all their rows fit."""
    fit = STRIP.get(device, 2**26) // bytes_of_a_row
    images, rows = max(1, fit // H), max(1, min(fit, H))
    for image in range(0, B, images):
        for row in range(0, H, rows):
            yield slice(image, image + images), slice(row, row + rows)
