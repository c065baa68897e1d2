"""The resize as a product with matrices, for every device and dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .taps import both_axes

GROUP = 2**28  # bytes of the widest maps at a time


def why_not(x: Tensor) -> None:
    """Return None: every device and dtype is supported."""


def add_forward(x: Tensor, weight: Tensor, out: Tensor, align_corners: bool) -> None:
    """Add the convolution of one resized map to ``out``.

    Args:
        x: ``[B, h, w, C]``, contiguous.
        weight: ``[O, C, k, k]``.
        out: ``[B, H, W, O]``, contiguous, in the dtype of ``x`` or in float32.
    """
    (_, h, w, C), (_, H, W, outputs), kernel = x.shape, out.shape, weight.shape[2]
    down, right = _matrices(x, H, W, kernel, align_corners)
    weights = weight.permute(2, 1, 3, 0).reshape(kernel, C, kernel * outputs)
    for images in _groups(x, W, kernel, outputs):
        pixels = x[images].view(-1, h * w, C)
        products = x.new_empty(len(pixels), kernel, h * w, kernel * outputs)
        for ky in range(kernel):
            torch.bmm(pixels, weights[ky].expand(len(pixels), -1, -1), out=products[:, ky])
        wide = right @ products.view(-1, w * kernel, outputs)  # n k h, W, O
        out[images] += (down @ wide.view(len(pixels), kernel * h, W * outputs)).view(-1, H, W, outputs)


def backward(grad: Tensor, x: Tensor, weight: Tensor, align_corners: bool, need: tuple[bool, bool]) -> tuple:
    """Gradients of ``x`` ``[B, h, w, C]`` and ``weight``, or None where not needed."""
    (B, h, w, C), (_, H, W, outputs), kernel = x.shape, grad.shape, weight.shape[2]
    down, right = _matrices(x, H, W, kernel, align_corners)
    products = x.new_empty(B, h * w, kernel, kernel * outputs)
    for images in _groups(x, W, kernel, outputs):
        wide = down.t() @ grad[images].view(-1, H, W * outputs)  # n, k h, W O
        part = right.t() @ wide.view(-1, W, outputs)  # n k h, w k, O
        products[images] = part.view(-1, kernel, h * w, kernel * outputs).transpose(1, 2)
    products = products.view(B * h * w, -1)
    transposed = weight.permute(2, 3, 0, 1).reshape(-1, C)
    dx = (products @ transposed).view(x.shape) if need[0] else None
    if not need[1]:
        return dx, None
    return dx, (products.t() @ x.view(-1, C)).view(kernel, kernel, outputs, C).permute(2, 3, 0, 1)


def _matrices(x: Tensor, H: int, W: int, kernel: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Resize and shift of the rows ``[H, k h]`` and of the columns ``[W, w k]``."""
    down, right = both_axes(x.shape[1:3], (H, W), kernel, align_corners, x)
    return down.permute(1, 0, 2).reshape(H, -1), right.permute(1, 2, 0).reshape(W, -1)


def _groups(x: Tensor, W: int, kernel: int, outputs: int) -> Iterator[slice]:
    """Images to process together."""
    images = max(1, GROUP // (kernel * x.shape[1] * W * outputs * x.element_size()))
    for image in range(0, len(x), images):
        yield slice(image, image + images)
