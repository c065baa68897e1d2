"""The definition: resize, concatenate, convolve. Every faster implementation is tested against it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_conv_reference(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int],
    align_corners: bool = False,
) -> Tensor:
    """See :func:`mmseg_volo.ops.resized_conv`; plain PyTorch."""
    resized = [F.interpolate(x, size, mode='bilinear', align_corners=align_corners) for x in maps]
    return F.conv2d(torch.cat(resized, 1), weight, bias, padding=weight.shape[2] // 2)
