"""Choice of the implementation; the only file that knows all implementations.

Each is a module with ``why_not``, ``forward`` and ``backward``.
"""

import math
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# In order of preference.
MODULES = {'triton': 'triton_kernels', 'cpu': 'cpu', 'torch': 'torch_form', 'reference': 'reference'}
FORCE = 'MMSEG_VOLO_OUTLOOK'


def choose(logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> ModuleType:
    """First implementation that fits, or the one that ``MMSEG_VOLO_OUTLOOK`` names.

    Raises:
        RuntimeError: the variable names an unknown implementation, or one that cannot process these tensors.
    """
    forced = os.environ.get(FORCE)
    if forced:
        if forced not in MODULES:
            raise RuntimeError(f'{FORCE} must be one of {", ".join(MODULES)}, got {forced!r}')
        reason = why_not(forced, logits, value, kernel_size, stride)
        if reason is not None:
            raise RuntimeError(f'{FORCE}={forced}, but {reason}')
        return _module(forced)
    return _module(next(name for name in MODULES if why_not(name, logits, value, kernel_size, stride) is None))


def why_not(name: str, logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> str | None:
    """Reason why this implementation cannot process these tensors, or None."""
    if name == 'triton':
        # Checked before the import, which is slow and useless on a CPU.
        if value.device.type == 'cpu' and not os.environ.get('TRITON_INTERPRET'):
            return 'the tensors are on cpu'
        if find_spec('triton') is None:
            return 'triton is not installed'
    return _module(name).why_not(logits, value, kernel_size, stride)


def explain() -> str:
    """Table that shows for each device and dtype which implementation runs, and why the others do not."""
    from prettytable import PrettyTable

    devices = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
    table = PrettyTable(['device', 'dtype', 'runs', *[f'why not {name}' for name in MODULES if name != 'reference']])
    table.align = 'l'
    table.max_width = 36
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            value = torch.empty(1, 4, 4, 64, device=device, dtype=dtype)
            logits = torch.empty(1, 2, 2, 2, 9, 9, device=device, dtype=dtype)
            reasons = {name: why_not(name, logits, value, 3, 2) for name in MODULES}
            chosen = os.environ.get(FORCE) or next(name for name in MODULES if reasons[name] is None)
            table.add_row(
                [device, str(dtype).removeprefix('torch.'), chosen]
                + [reasons[name] or '' for name in MODULES if name != 'reference']
            )
    return str(table)


def _module(name: str) -> ModuleType:
    return import_module(f'.{MODULES[name]}', __package__)


@torch.library.custom_op('mmseg_volo::outlook_attention', mutates_args=())
def outlook_attention_op(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """Opaque operator for torch.compile, torch.export and autograd, which chooses an implementation when it runs."""
    if value.numel() == 0:
        return torch.empty_like(value, memory_format=torch.contiguous_format)
    with torch.autocast(value.device.type, enabled=False):
        return choose(logits, value, kernel_size, stride).forward(logits, value, kernel_size, stride, scale)


@torch.library.custom_op('mmseg_volo::outlook_attention_backward', mutates_args=())
def outlook_attention_backward_op(
    grad: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value."""
    if value.numel() == 0:
        return torch.zeros_like(logits), torch.empty_like(value, memory_format=torch.contiguous_format)
    with torch.autocast(value.device.type, enabled=False):
        dlogits, dvalue = choose(logits, value, kernel_size, stride).backward(
            grad, logits, value, kernel_size, stride, scale
        )
    promised = torch.empty_like(logits, device='meta').stride()
    if dlogits.stride() != promised:
        dlogits = torch.empty_strided(logits.shape, promised, dtype=logits.dtype, device=logits.device).copy_(dlogits)
    return dlogits, dvalue


@outlook_attention_op.register_fake
def _(logits, value, kernel_size, stride, scale):
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@outlook_attention_backward_op.register_fake
def _(grad, logits, value, kernel_size, stride, scale):
    return torch.empty_like(logits), torch.empty_like(value, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.mmseg_volo.outlook_attention)
def _flops(logits_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations per multiply-add of the weighting, as torch counts matrix products."""
    return 2 * math.prod(logits_shape) * value_shape[-1] // logits_shape[3]


def _save(ctx, inputs, output) -> None:
    logits, value, *ctx.geometry = inputs
    ctx.save_for_backward(logits, value)


def _differentiate(ctx, grad: Tensor):
    return *outlook_attention_backward_op(grad, *ctx.saved_tensors, *ctx.geometry), None, None, None


outlook_attention_op.register_autograd(_differentiate, setup_context=_save)


def _batched(op):
    """vmap: the mapped dimension joins the batch."""

    def rule(info, in_dims, *args):
        tensors = [
            tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip(args, in_dims, strict=True)
            if isinstance(tensor, Tensor)
        ]
        geometry = args[len(tensors) :]
        result = op(*[tensor.flatten(0, 1) for tensor in tensors], *geometry)
        if isinstance(result, Tensor):
            return result.unflatten(0, tensors[0].shape[:2]), 0
        return tuple(part.unflatten(0, tensors[0].shape[:2]) for part in result), (0,) * len(result)

    return rule


for _op in (outlook_attention_op, outlook_attention_backward_op):
    _op.register_vmap(_batched(_op))
