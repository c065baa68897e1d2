"""Outlook attention as the paper defines it; every faster implementation is tested against it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def outlook_attention_reference(
    logits: Tensor, value: Tensor, *, kernel_size: int, stride: int, scale: float
) -> Tensor:
    """Unfold the windows, weight them, fold them back; see :func:`mmseg_volo.ops.outlook_attention`.

    Plain PyTorch, differentiable any number of times.
    """
    mixed = _weights(logits, value, scale) @ _windows(value, logits, kernel_size, stride)  # B, h * w, N, K, d
    return _fold(mixed, value, kernel_size, stride)


def why_not(logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> str | None:
    """Return None: every device, dtype, window and stride is supported."""
    return None


def forward(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    out = outlook_attention_reference(logits, value, kernel_size=kernel_size, stride=stride, scale=scale)
    return out.contiguous()


def backward(
    grad: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value, as autograd computes them."""
    weights = _weights(logits, value, scale)
    dmixed = _windows(grad, logits, kernel_size, stride)
    dvalue = _fold(weights.mT @ dmixed, value, kernel_size, stride)
    dweights = (dmixed @ _windows(value, logits, kernel_size, stride).mT).view_as(logits)
    weights = (logits * scale).softmax(dim=-1)
    dlogits = torch._softmax_backward_data(dweights.to(logits.dtype), weights, -1, logits.dtype) * scale
    return dlogits, dvalue.contiguous()


def _weights(logits: Tensor, value: Tensor, scale: float) -> Tensor:
    B, h, w, N, K, _ = logits.shape
    return (logits * scale).softmax(dim=-1).reshape(B, h * w, N, K, K).to(value.dtype)


def _windows(tokens: Tensor, logits: Tensor, kernel_size: int, stride: int) -> Tensor:
    B, H, W, C = tokens.shape
    _, h, w, N, K, _ = logits.shape
    windows = F.unfold(tokens.permute(0, 3, 1, 2), kernel_size, padding=kernel_size // 2, stride=stride)
    return windows.view(B, N, C // N, K, h * w).permute(0, 4, 1, 3, 2)  # B, h * w, N, K, d


def _fold(mixed: Tensor, value: Tensor, kernel_size: int, stride: int) -> Tensor:
    B, windows, N, K, d = mixed.shape
    columns = mixed.permute(0, 2, 4, 3, 1).reshape(B, N * d * K, windows)
    out = F.fold(columns, value.shape[1:3], kernel_size, padding=kernel_size // 2, stride=stride)
    return out.permute(0, 2, 3, 1)
