"""Loss and gradient fused in C++, for CPUs: ``cpu.cpp``, called through ctypes."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from .taps import taps

SOURCE = Path(__file__).with_name('cpu.cpp')


def why_not(scores: Tensor) -> str | None:
    """Reason why this implementation cannot process ``scores``, or None."""
    if scores.device.type != 'cpu':
        return f'the tensors are on {scores.device}'
    if scores.dtype == torch.float64:
        return 'it sums in float32'
    library = native.library(SOURCE)
    return library if isinstance(library, str) else None


def compute(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`.torch_form.compute`."""
    B, K, h, w = scores.shape
    H, W = labels.shape[1:]
    images, labels = scores.float().contiguous(), labels.contiguous()
    weight = None if class_weight is None else class_weight.float().contiguous()
    gradient, below = (torch.empty_like(images) if need_gradient else None for _ in range(2))
    totals, counts = images.new_empty(B * h, dtype=torch.float64), labels.new_empty(B * h)
    transposed = _transposed_taps(w, W, align_corners)
    invalid = _function()(
        *map(_pointer, (images, labels, weight)),
        *[ctypes.c_int64(number) for number in (ignore_index, B, K, h, w, H, W)],
        *map(_pointer, (*_taps(h, H, align_corners), *_taps(w, W, align_corners))),
        ctypes.c_int64(len(transposed[0])),
        *map(_pointer, (*transposed, gradient, below, totals, counts)),
        ctypes.c_int(torch.get_num_threads()),
    )
    if invalid >= 0:
        raise IndexError(f'label {labels.flatten()[invalid]} is out of bounds for {K} classes')
    return totals.sum().float(), counts.sum(), None if gradient is None else gradient.to(scores.dtype)


@lru_cache(64)
def _taps(source: int, target: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    first, second, share = taps(source, target, align_corners, torch.device('cpu'), torch.float32)
    return first.int(), second.int(), share


@lru_cache(64)
def _transposed_taps(source: int, target: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Target positions and weights of each source position, ``[taps, source]`` both; unused taps weigh 0."""
    first, second, share = taps(source, target, align_corners, torch.device('cpu'), torch.float32)
    matrix = torch.zeros(target, source)
    matrix.scatter_add_(1, first[:, None], 1 - share[:, None]).scatter_add_(1, second[:, None], share[:, None])
    order = (matrix != 0).int().sort(dim=0, descending=True, stable=True).indices[: int((matrix != 0).sum(0).max())]
    return order.int().contiguous(), matrix.gather(0, order).contiguous()


def _function():
    function = native.library(SOURCE).cross_entropy
    function.restype = ctypes.c_int64
    return function


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
