"""The convolution for torch.export: any size and batch, and only operators that every runtime has."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

NARROW = 100  # channels below which a resize before the convolution takes less time than after it


def resized_conv(maps: Sequence[Tensor], weight: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """See :func:`mmseg_volo.ops.resized_conv`."""
    kernel, direct, total, first = weight.shape[2], [], None, 0
    for x in maps:
        part, first = weight[:, first : first + x.shape[1]], first + x.shape[1]
        same = statically_known_true(x.shape[2] == height) and statically_known_true(x.shape[3] == width)
        if same:
            direct.append((x, part))
        elif x.shape[1] < NARROW:
            direct.append((F.interpolate(x, (height, width), mode='bilinear', align_corners=align_corners), part))
        else:
            y = _convolved_then_resized(x, part, height, width, align_corners)
            total = y if total is None else total + y
    if direct:
        inputs, parts = ([pair[i] for pair in direct] for i in range(2))
        y = F.conv2d(torch.cat(inputs, 1), torch.cat(parts, 1), padding=kernel // 2)
        total = y if total is None else total + y
    return total


def _convolved_then_resized(x: Tensor, weight: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The sum of shifted and resized 1x1 convolutions; see ``ops/resized_maps/README.md``."""
    outputs, C, kernel, _ = weight.shape
    if kernel == 1:
        return F.interpolate(F.conv2d(x, weight), (height, width), mode='bilinear', align_corners=align_corners)
    products = F.conv2d(x, weight.permute(0, 2, 3, 1).reshape(-1, C, 1, 1))  # B, outputs * ky * kx, h, w
    products = products.unflatten(1, (outputs * kernel, kernel)).transpose(2, 3).flatten(3)
    wide = products @ _resize(x.shape[3], width, kernel, align_corners, x)  # B, outputs * ky, h, width
    wide = wide.unflatten(1, (outputs, kernel)).flatten(2, 3)
    return _resize(x.shape[2], height, kernel, align_corners, x).t() @ wide


def _resize(source: int, target: int, kernel: int, align_corners: bool, like: Tensor) -> Tensor:
    """``[kernel * source, target]``: resize an axis bilinearly, then shift it by -1, 0 and 1; zeros come in.

    Positions are integers, which no runtime rounds: numerators of fractions of ``unit``.
    """
    shift = torch.arange(kernel, device=like.device)[:, None, None] - kernel // 2
    place = torch.arange(source, device=like.device)[:, None]
    to = torch.arange(target, device=like.device) + shift
    if align_corners:
        unit = torch.sym_max(target - 1, 1)
        position = to * (source - 1)
    else:
        unit = 2 * target
        position = ((2 * to + 1) * source - target).clamp(0, (source - 1) * unit)
    taps = (unit - (position - place * unit).abs()).clamp(min=0) * ((to >= 0) & (to < target))
    return (taps.to(like.dtype) / unit).reshape(kernel * source, target)
