"""Outlook attention in PyTorch, faster than the reference: one strided copy of the windows, one matrix product."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> str | None:
    """Return None: every device, dtype, window and stride is supported."""
    return None


def forward(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    mixed = _weights(logits, value, scale) @ _windows(value, logits, kernel_size, stride)
    return _fold(mixed, value, logits, kernel_size, stride)


def backward(
    grad: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value. That of value is the same operator with each K x K matrix transposed."""
    weights = _weights(logits, value, scale)
    dmixed = _windows(grad, logits, kernel_size, stride)  # B h w N, K, d
    dvalue = _fold(weights.transpose(1, 2) @ dmixed, value, logits, kernel_size, stride)
    dweights = dmixed @ _windows(value, logits, kernel_size, stride).transpose(1, 2)
    del dmixed
    if weights.dtype != logits.dtype or weights.dtype.itemsize < 4:
        weights, dweights = weights.float(), dweights.float()
    dlogits = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(scale)
    return dlogits.to(logits.dtype).view(logits.shape), dvalue


def _weights(logits: Tensor, value: Tensor, scale: float) -> Tensor:
    """``[B h w N, K, K]`` in value's dtype; softmax in at least float32."""
    K = logits.shape[-1]
    scaled = logits.reshape(-1, K, K).to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return scaled.softmax(dim=-1).to(value.dtype)


def _windows(tokens: Tensor, logits: Tensor, kernel_size: int, stride: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B h w N, K, d]``, zeros outside the map."""
    B, H, W, C = tokens.shape
    _, h, w, N, K, _ = logits.shape
    before = kernel_size // 2
    after_x, after_y = ((windows - 1) * stride + kernel_size - before - size for windows, size in ((w, W), (h, H)))
    padded = F.pad(tokens, (0, 0, before, after_x, before, after_y))
    windows = padded.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)  # B, h, w, C, k, k
    return windows.unflatten(3, (N, C // N)).permute(0, 1, 2, 3, 5, 6, 4).reshape(B * h * w * N, K, C // N)


def _fold(mixed: Tensor, value: Tensor, logits: Tensor, kernel_size: int, stride: int) -> Tensor:
    """``[B h w N, K, d]`` summed into ``[B, H, W, C]``, one class of tokens (place modulo stride) at a time."""
    B, H, W, C = value.shape
    _, h, w, N, K, _ = logits.shape
    mixed = mixed.view(B, h, w, N, kernel_size, kernel_size, C // N)
    out = mixed.new_empty(B, h, stride, w, stride, N, C // N)
    # Place a of window i is token row stride * (i + shift) + row.
    places = [(*divmod(a - kernel_size // 2, stride), a) for a in range(kernel_size)]
    for row, column in product(range(stride), repeat=2):
        tokens = out[:, :, row, :, column]
        sources = [
            (dy, dx, mixed[:, :, :, :, a, b]) for dy, r, a in places for dx, c, b in places if (r, c) == (row, column)
        ]
        sources.sort(key=lambda source: source[:2] != (0, 0))  # the one that covers the class comes first
        for number, (dy, dx, source) in enumerate(sources):
            if number == 0 and (dy, dx) == (0, 0):
                tokens.copy_(source)
                continue
            if number == 0:
                tokens.zero_()
            to_y, from_y = _shifted(dy, h)
            to_x, from_x = _shifted(dx, w)
            tokens[:, to_y, to_x] += source[:, from_y, from_x]
    return out.view(B, h * stride, w * stride, C)[:, :H, :W].contiguous()


def _shifted(by: int, length: int) -> tuple[slice, slice]:
    """Slices that pair element i + by with element i, where both exist."""
    return slice(max(by, 0), max(length + min(by, 0), 0)), slice(max(-by, 0), max(length - max(by, 0), 0))
