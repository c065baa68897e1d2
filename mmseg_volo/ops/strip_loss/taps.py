"""The bilinear resize of one axis, as positions and shares."""

import torch
from torch import Tensor


def taps(
    source: int, target: int, align_corners: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The two source positions of each target position, and the share of the second one."""
    y = torch.arange(target, dtype=torch.float64, device=device)
    if align_corners:
        position = y * ((source - 1) / (target - 1) if target > 1 else 0)
    else:
        position = ((y + 0.5) * (source / target) - 0.5).clamp(min=0)
    first = position.floor().long().clamp(max=source - 1)
    return first, (first + 1).clamp(max=source - 1), (position - first).to(dtype)
