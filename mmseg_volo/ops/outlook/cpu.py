"""Outlook attention fused in C++, for CPUs: ``cpu.cpp``, called through ctypes."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import native

SOURCE = Path(__file__).with_name('cpu.cpp')
SUFFIXES = {torch.float32: 'float32', torch.bfloat16: 'bfloat16'}


def why_not(logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> str | None:
    """Reason why this implementation cannot process these tensors, or None."""
    if value.device.type != 'cpu':
        return f'the tensors are on {value.device}'
    if (kernel_size, stride) != (3, 2):
        return f'it supports only window 3 with stride 2, not {kernel_size} with {stride}'
    if value.dtype not in SUFFIXES:
        return f'it supports only float32 and bfloat16, not {value.dtype}'
    return why_not_built(value.shape[-1] // logits.shape[3])


def why_not_built(head_width: int) -> str | None:
    """Reason why the library for this head width cannot be built or loaded, or None; builds it if necessary."""
    library = _library(head_width)
    return library if isinstance(library, str) else None


def forward(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    logits, value = logits.contiguous(), value.contiguous()
    out = torch.empty_like(value)
    _call('forward', logits, value, (value, logits, out), scale)
    return out


def backward(
    grad: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value."""
    grad, logits, value = grad.contiguous(), logits.contiguous(), value.contiguous()
    dlogits = torch.empty_like(logits)
    dvalue = torch.empty_like(value, dtype=torch.float32)
    _call('backward', logits, value, (value, logits, grad, dvalue, dlogits), scale)
    return dlogits, dvalue.to(value.dtype)


def _call(name: str, logits: Tensor, value: Tensor, tensors: tuple[Tensor, ...], scale: float) -> None:
    B, H, W, C = value.shape
    N = logits.shape[3]
    function = getattr(_library(C // N), f'{name}_{SUFFIXES[value.dtype]}')
    function(
        *[ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors],
        *[ctypes.c_int64(size) for size in (B, H, W, N)],
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )


def _library(head_width: int) -> ctypes.CDLL | str:
    return native.library(SOURCE, f'-DHEAD_WIDTH={head_width}')
