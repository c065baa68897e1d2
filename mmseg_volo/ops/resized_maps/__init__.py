"""Convolution of resized feature maps, computed at the resolution of the maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import is_exporting
from . import portable
from .operator import explain, resized_conv_op
from .same_size import has_faster_backward

__all__ = ['explain', 'resized_conv']


def resized_conv(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: Sequence[int],
    align_corners: bool = False,
) -> Tensor:
    """Convolve the concatenation of ``maps``, each resized bilinearly to ``size``, without resizing the maps.

    A bilinear resize commutes with a 1x1 convolution, and a 3x3 convolution is the sum of nine shifted 1x1
    convolutions. A map of h x w pixels therefore takes h w / (H W) of the multiplications. The method is explained in
    ``ops/resized_maps/README.md``.

    Args:
        maps: ``[B, C_i, h_i, w_i]`` each. Only maps and weight are stored for the backward pass. Maps for which the
            method would not save time (not much smaller than ``size``, or few channels) are resized after all.
        weight: ``[O, sum of C_i, k, k]``, k = 1 or 3. The convolution is padded with k // 2 zeros.
        bias: ``[O]`` or None.
        size: H and W of the output.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        ``[B, O, H, W]`` in channels-last format. Under autocast it has autocast's dtype, otherwise that of the maps.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    size = tuple(size)
    device = maps[0].device.type if maps else 'cpu'
    if device != 'meta' and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        maps, weight = [x.to(dtype) for x in maps], weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(maps, weight, size)
    if is_exporting():
        y = portable.resized_conv(maps, weight, *size, align_corners)
        return y if bias is None else y + bias[:, None, None]
    if len(maps) == 1 and maps[0].shape[2:] == size and not has_faster_backward(maps[0], weight):
        return F.conv2d(maps[0], weight, bias, padding=weight.shape[2] // 2)
    y = resized_conv_op(list(maps), weight, *size, align_corners)
    if bias is None:
        return y
    return y + bias[:, None, None] if torch.is_grad_enabled() else y.add_(bias[:, None, None])


def _check(maps: Sequence[Tensor], weight: Tensor, size: tuple[int, ...]) -> None:
    if not maps or any(x.dim() != 4 or x.shape[0] != maps[0].shape[0] for x in maps):
        raise ValueError(f'maps must be [B, C, h, w] with one B, got shapes {[tuple(x.shape) for x in maps]}')
    channels = sum(x.shape[1] for x in maps)
    if weight.dim() != 4 or tuple(weight.shape[1:]) not in ((channels, 1, 1), (channels, 3, 3)):
        raise ValueError(f'weight must be [O, {channels}, k, k] with k = 1 or 3, got shape {tuple(weight.shape)}')
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f'size must be two positive numbers, got {size}')
    kinds = {f'{x.dtype} on {x.device}' for x in (*maps, weight)}
    if len(kinds) > 1 or not weight.is_floating_point():
        raise ValueError(f'maps and weight must have one floating-point dtype and one device, got {sorted(kinds)}')
