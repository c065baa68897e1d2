"""Outlook attention written as the paper has it: the definition that every faster form is tested against."""

import torch.nn.functional as F
from torch import Tensor


def outlook_attention_reference(
    logits: Tensor, value: Tensor, *, kernel_size: int, stride: int, scale: float
) -> Tensor:
    """Unfold the windows, weight them, fold them back; see :func:`mmseg_volo.ops.outlook_attention`."""
    B, H, W, C = value.shape
    _, h, w, N, K, _ = logits.shape
    geometry = dict(kernel_size=kernel_size, padding=kernel_size // 2, stride=stride)

    windows = F.unfold(value.permute(0, 3, 1, 2), **geometry)  # B, C * K, h * w
    windows = windows.view(B, N, C // N, K, h * w).permute(0, 4, 1, 3, 2)  # B, h * w, N, K, d
    weights = (logits * scale).softmax(dim=-1).reshape(B, h * w, N, K, K)
    mixed = weights.to(value.dtype) @ windows  # B, h * w, N, K, d
    mixed = mixed.permute(0, 2, 4, 3, 1).reshape(B, C * K, h * w)
    return F.fold(mixed, output_size=(H, W), **geometry).permute(0, 2, 3, 1)
