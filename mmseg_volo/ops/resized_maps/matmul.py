"""The resize as a product with matrices, for every device and dtype."""

import torch
from torch import Tensor

from .taps import matrices


def why_not(x: Tensor) -> None:
    """Return None: every device and dtype is supported."""


def add_forward(x: Tensor, weight: Tensor, out: Tensor, align_corners: bool) -> None:
    """Add the convolution of one resized map to ``out``.

    Args:
        x: ``[B, h, w, C]``, contiguous.
        weight: ``[O, C, k, k]``.
        out: ``[B, H, W, O]``, contiguous, in the dtype of ``x`` or in float32.
    """
    (B, h, w, C), (_, H, W, outputs), kernel = x.shape, out.shape, weight.shape[2]
    rows, columns = _matrices(x, H, W, kernel, align_corners)
    columns = columns.permute(1, 2, 0).reshape(W, w * kernel)
    for ky in range(kernel):
        # [C, kernel * O]
        products = x.view(-1, C) @ weight[:, :, ky].permute(1, 2, 0).reshape(C, kernel * outputs)
        wide = torch.matmul(columns, products.view(B * h, w * kernel, outputs))
        out += torch.matmul(rows[ky], wide.view(B, h, W * outputs)).view(out.shape)


def backward(grad: Tensor, x: Tensor, weight: Tensor, align_corners: bool, need: tuple[bool, bool]) -> tuple:
    """Gradients of ``x`` ``[B, h, w, C]`` and ``weight``, or None where not needed."""
    (B, h, w, C), (_, H, W, outputs), kernel = x.shape, grad.shape, weight.shape[2]
    rows, columns = _matrices(x, H, W, kernel, align_corners)
    columns = columns.permute(2, 0, 1).reshape(w * kernel, W)
    products = x.new_empty(B * h * w, kernel, kernel * outputs)
    for ky in range(kernel):
        wide = torch.matmul(rows[ky].t().expand(B, h, H), grad.view(B, H, W * outputs))
        products[:, ky] = torch.matmul(columns, wide.view(B * h, W, outputs)).view(-1, kernel * outputs)
    products = products.view(B * h * w, -1)
    transposed = weight.permute(2, 3, 0, 1).reshape(-1, C)
    dx = (products @ transposed).view(x.shape) if need[0] else None
    if not need[1]:
        return dx, None
    return dx, (products.t() @ x.view(-1, C)).view(kernel, kernel, outputs, C).permute(2, 3, 0, 1)


def _matrices(x: Tensor, H: int, W: int, kernel: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    h, w = x.shape[1:3]
    return tuple(
        matrices(source, target, kernel, align_corners, x.dtype, str(x.device)) for source, target in ((h, H), (w, W))
    )
