"""The operator, and the choice of its implementation.

Each implementation of the resize is a module with ``why_not``, ``add_forward`` and ``backward``.
"""

import os
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..choices import choices_table
from . import same_size
from .taps import both_axes

# In order of preference.
MODULES = 'cpu', 'matmul'
FORCE = 'MMSEG_VOLO_RESIZED_CONV'
SAVING = 300  # see _saves_time
LAUNCHES, TRAFFIC = 10**11, 2000


def choose(x: Tensor) -> ModuleType:
    """First implementation that fits ``x``, or the one that ``MMSEG_VOLO_RESIZED_CONV`` names.

    Raises:
        RuntimeError: the variable names an unknown implementation, or one that cannot process ``x``.
    """
    forced = os.environ.get(FORCE)
    if not forced:
        return _module(next(name for name in MODULES if _module(name).why_not(x) is None))
    if forced not in MODULES:
        raise RuntimeError(f'{FORCE} must be one of {", ".join(MODULES)}, got {forced!r}')
    reason = _module(forced).why_not(x)
    if reason is not None:
        raise RuntimeError(f'{FORCE}={forced}, but {reason}')
    return _module(forced)


def explain() -> str:
    """Table that shows for each device and dtype which implementation runs, and why the first choice does not."""
    return choices_table(lambda x: choose(x).__name__.rpartition('.')[2], 'cpu', _module('cpu').why_not)


def _module(name: str) -> ModuleType:
    return import_module(f'.{name}', __package__)


@torch.library.custom_op('mmseg_volo::resized_conv', mutates_args=())
def resized_conv_op(maps: list[Tensor], weight: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """Opaque operator for torch.compile, torch.export and autograd, which chooses an implementation when it runs."""
    size = height, width
    parts = _parts(maps, weight)
    direct = _direct(maps, weight, size)
    with torch.autocast(weight.device.type, enabled=False):
        if direct:
            joined = _joined([maps[i] for i in direct], size, align_corners)
            out = same_size.forward(joined, torch.cat([parts[i] for i in direct], 1)).contiguous()
        else:
            out = weight.new_zeros(len(maps[0]), *size, len(weight))
        if len(direct) < len(maps) and out.dtype in (torch.bfloat16, torch.float16):
            out = out.float()  # the sum over maps and shifts
        for i, (x, part) in enumerate(zip(maps, parts, strict=True)):
            if i not in direct:
                choose(x).add_forward(_rows(x), part, out, align_corners)
    return out.to(weight.dtype).permute(0, 3, 1, 2)


@torch.library.custom_op('mmseg_volo::resized_conv_backward', mutates_args=())
def resized_conv_backward_op(
    grad: Tensor, maps: list[Tensor], weight: Tensor, align_corners: bool, need_maps: list[bool], need_weight: bool
) -> list[Tensor]:
    """Gradients of weight and maps; an empty tensor where a gradient is not needed."""
    size = tuple(grad.shape[2:])
    grad = _rows(grad)
    parts = _parts(maps, weight)
    direct = _direct(maps, weight, size)
    dmaps: list[Tensor | None] = [None] * len(maps)
    dparts: list[Tensor | None] = [None] * len(maps)
    with torch.autocast(weight.device.type, enabled=False):
        if direct:
            joined = _joined([maps[i] for i in direct], size, align_corners)
            need = any(need_maps[i] for i in direct), need_weight
            dx, dpart = same_size.backward(grad, joined, torch.cat([parts[i] for i in direct], 1), need)
            del joined
            channels = [maps[i].shape[1] for i in direct]
            if need_weight:
                for i, part in zip(direct, dpart.split(channels, 1), strict=True):
                    dparts[i] = part
            if need[0]:
                for i, part in zip(direct, dx.split(channels, 3), strict=True):
                    if need_maps[i]:
                        dmaps[i] = _unresized(part, maps[i], align_corners)
        for i, (x, part) in enumerate(zip(maps, parts, strict=True)):
            if i not in direct:
                need = need_maps[i], need_weight
                dx, dparts[i] = choose(x).backward(grad, _rows(x), part, align_corners, need)
                dmaps[i] = None if dx is None else dx.permute(0, 3, 1, 2)
    empty = weight.new_empty(0)
    dweight = torch.cat(dparts, 1).contiguous() if need_weight else empty
    return [dweight, *[empty.clone() if dx is None else dx for dx in dmaps]]


@resized_conv_op.register_fake
def _(maps, weight, height, width, align_corners):
    return weight.new_empty(maps[0].shape[0], height, width, len(weight)).permute(0, 3, 1, 2)


@resized_conv_backward_op.register_fake
def _(grad, maps, weight, align_corners, need_maps, need_weight):
    gradients = [_like(x) if need else weight.new_empty(0) for x, need in zip(maps, need_maps, strict=True)]
    return [weight.new_empty(weight.shape if need_weight else 0), *gradients]


@register_flop_formula(torch.ops.mmseg_volo.resized_conv)
def _flops(maps_shapes, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations per multiply-add of the products, as torch counts convolutions."""
    outputs, _, kernel, _ = weight_shape
    return sum(2 * B * C * h * w * outputs * kernel**2 for B, C, h, w in maps_shapes)


def _save(ctx, inputs, output) -> None:
    maps, weight, _, _, ctx.align_corners = inputs
    ctx.save_for_backward(weight, *maps)


def _differentiate(ctx, grad: Tensor):
    weight, *maps = ctx.saved_tensors
    need_maps = [bool(need) for need in ctx.needs_input_grad[0]]
    need_weight = ctx.needs_input_grad[1]
    dweight, *dmaps = resized_conv_backward_op(grad, maps, weight, ctx.align_corners, need_maps, need_weight)
    gradients = [dx if need else None for dx, need in zip(dmaps, need_maps, strict=True)]
    return gradients, dweight if need_weight else None, None, None, None


resized_conv_op.register_autograd(_differentiate, setup_context=_save)


def _direct(maps: list[Tensor], weight: Tensor, size: tuple[int, int]) -> list[int]:
    """Indices of the maps that are resized and then convolved, because their own resolution saves no time."""
    return [i for i, x in enumerate(maps) if not _saves_time(x, weight, *size)]


def _saves_time(x: Tensor, weight: Tensor, H: int, W: int) -> bool:
    """Whether the saved multiplications take longer than what the method adds.

    On a CPU that is the memory traffic of the products: it pays from (H W / h w - 1) C = 300 on. On a GPU it is a
    dozen kernels, in whose time an H100 does 10^11 multiplications, and traffic, worth 2000 for each element of the
    output.
    """
    B, C, h, w = x.shape
    if h > H or w > W:
        return False
    if x.device.type == 'cuda':
        saved = B * (H * W - h * w) * C * len(weight) * weight.shape[2] ** 2
        return saved >= LAUNCHES + TRAFFIC * B * H * W * len(weight)
    return (H * W - h * w) * C >= SAVING * h * w


def _joined(maps: list[Tensor], size: tuple[int, int], align_corners: bool) -> Tensor:
    """The concatenation of the maps, each resized to ``size``, ``[B, H, W, C]``."""
    resized = [
        x if x.shape[2:] == size else F.interpolate(_rows(x).permute(0, 3, 1, 2), size, None, 'bilinear', align_corners)
        for x in maps
    ]
    return _rows(resized[0] if len(resized) == 1 else torch.cat(resized, 1))


def _unresized(dx: Tensor, x: Tensor, align_corners: bool) -> Tensor:
    """Gradient of ``x`` from that of the resized map ``[B, H, W, C]``."""
    dx = dx.contiguous().permute(0, 3, 1, 2)
    if dx.shape == x.shape:
        return dx
    if dx.device.type == 'cuda':  # PyTorch's gradient of a resize adds in random order there
        (h, w), H = x.shape[2:], dx.shape[2]
        (down,), (right,) = both_axes((h, w), dx.shape[2:], 1, align_corners, dx)
        narrow = right.t() @ _rows(dx).flatten(0, 1)  # B H, w, C
        return (down.t() @ narrow.view(len(dx), H, -1)).view(len(dx), h, w, -1).permute(0, 3, 1, 2)
    gradient = torch.ops.aten.upsample_bilinear2d_backward(dx, dx.shape[2:], x.shape, align_corners, None, None)
    return _rows(gradient).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` as contiguous ``[B, H, W, C]``: a view of a channels-last tensor."""
    return image.permute(0, 2, 3, 1).contiguous()


def _like(image: Tensor) -> Tensor:
    """An empty channels-last tensor of the shape of ``image``."""
    B, C, H, W = image.shape
    return image.new_empty(B, H, W, C).permute(0, 3, 1, 2)


def _parts(maps: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    """The weight of each map."""
    return weight.split([x.shape[1] for x in maps], 1)
