"""The resize fused in C++, for CPUs: ``cpu.cpp``, called through ctypes."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from ..products import linear, weight_gradient
from .taps import backward_taps, forward_taps

SOURCE = Path(__file__).with_name('cpu.cpp')
SUFFIXES = {torch.float32: 'float32', torch.float64: 'float64'}
STRIP = 2**24  # bytes of products at a time, so that they stay in the cache


def why_not(x: Tensor) -> str | None:
    """Reason why this implementation cannot process ``x``, or None."""
    if x.device.type != 'cpu':
        return f'the tensors are on {x.device}'
    if x.dtype not in SUFFIXES:
        return f'it supports only float32 and float64, not {x.dtype}'
    library = native.library(SOURCE)
    return library if isinstance(library, str) else None


def add_forward(x: Tensor, weight: Tensor, out: Tensor, align_corners: bool) -> None:
    """See :func:`.matmul.add_forward`."""
    (_, h, w, C), (_, H, W, outputs), kernel = x.shape, out.shape, weight.shape[2]
    taps = [
        *forward_taps(h, H, kernel, align_corners, x.dtype),
        *forward_taps(w, W, kernel, align_corners, x.dtype),
    ]
    weight = weight.permute(2, 3, 0, 1).reshape(-1, C)
    for image, first, last in _strips(x, len(weight)):
        products = linear(x[image, first:last], weight)
        _call('spread', products, out[image], (first, last, w, H, W, outputs, kernel), taps)


def backward(grad: Tensor, x: Tensor, weight: Tensor, align_corners: bool, need: tuple[bool, bool]) -> tuple:
    """See :func:`.matmul.backward`."""
    (_, h, w, C), (_, H, W, outputs), kernel = x.shape, grad.shape, weight.shape[2]
    taps = [
        *backward_taps(h, H, kernel, align_corners, x.dtype),
        *backward_taps(w, W, kernel, align_corners, x.dtype),
    ]
    transposed = weight.permute(1, 2, 3, 0).reshape(C, -1)
    dx = torch.empty_like(x) if need[0] else None
    dweight = x.new_zeros(transposed.shape[1], C) if need[1] else None
    for image, first, last in _strips(x, transposed.shape[1]):
        products = x.new_empty(last - first, w, transposed.shape[1])
        _call('gather', grad[image], products, (first, last, w, H, W, outputs, kernel), taps)
        if need[0]:
            dx[image, first:last] = linear(products, transposed)
        if need[1]:
            dweight += weight_gradient(products, x[image, first:last])
    return dx, None if dweight is None else dweight.view(kernel, kernel, outputs, C).permute(2, 3, 0, 1)


def _strips(x: Tensor, columns: int) -> Iterator[tuple[int, int, int]]:
    """Image, first row and last row + 1 of each strip."""
    B, h, w, _ = x.shape
    rows = max(1, STRIP // (w * columns * x.element_size()))
    return ((image, first, min(first + rows, h)) for image in range(B) for first in range(0, h, rows))


def _call(name: str, source: Tensor, target: Tensor, sizes: tuple[int, ...], taps: list[Tensor]) -> None:
    getattr(native.library(SOURCE), f'{name}_{SUFFIXES[source.dtype]}')(
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_void_p(target.data_ptr()),
        *[ctypes.c_int64(size) for size in sizes],
        *[ctypes.c_void_p(tensor.data_ptr()) for tensor in taps],
        ctypes.c_int(torch.get_num_threads()),
    )
