"""Outlook attention for torch.export: any size and batch, and only operators that every runtime has.

Windows are slices, which are stacked; overlapping ones are summed after padding. They are neither unfolded, for which
ONNX has only a slow operator, nor scattered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def outlook_attention(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`; differentiable any number of times."""
    (B, H, W, C), (_, h, w, N, K, _) = value.shape, logits.shape
    windows = _windows(value, 1, h, kernel_size, stride)  # B, h, k, W, C
    windows = _windows(windows, 3, w, kernel_size, stride)  # B, h, k, w, k, C
    windows = windows.permute(0, 1, 3, 2, 4, 5).reshape(B, h, w, K, N, C // N).transpose(3, 4)
    mixed = (logits * scale).softmax(-1) @ windows  # B, h, w, N, K, d
    mixed = mixed.transpose(3, 4).reshape(B, h, w, kernel_size, kernel_size, C)
    rows = _fold(mixed.permute(0, 1, 3, 2, 4, 5), 1, kernel_size, stride)  # B, h * stride, w, k, C
    return _fold(rows, 2, kernel_size, stride)[:, :H, :W]


def _windows(tokens: Tensor, dim: int, windows: int, kernel_size: int, stride: int) -> Tensor:
    """Windows along ``dim``, whose places follow in a new dimension; zeros outside the map."""
    before, last = kernel_size // 2, (windows - 1) * stride
    after = last + kernel_size - before - tokens.shape[dim]
    padded = F.pad(tokens, (0, 0) * (tokens.dim() - 1 - dim) + (before, after))
    places = [
        padded.narrow(dim, place, last + 1)[(slice(None),) * dim + (slice(None, None, stride),)]
        for place in range(kernel_size)
    ]
    return torch.stack(places, dim + 1)


def _fold(windows: Tensor, dim: int, kernel_size: int, stride: int) -> Tensor:
    """Sum of the windows along ``dim``, whose places are in the next dimension; the reverse of ``_windows``."""
    length = windows.shape[dim]
    sums: list = [None] * stride
    for place in range(kernel_size):
        # Place p of window i is token stride * (i + shift) + row.
        shift, row = divmod(place - kernel_size // 2, stride)
        part = windows.select(dim + 1, place)
        ends = (0, 0) * (part.dim() - 1 - dim)
        if shift < 0:
            part = F.pad(part.narrow(dim, -shift, length + shift), (*ends, 0, -shift))
        elif shift > 0:
            part = F.pad(part.narrow(dim, 0, length - shift), (*ends, shift, 0))
        sums[row] = part if sums[row] is None else sums[row] + part
    return torch.stack(sums, dim + 1).flatten(dim, dim + 1)
