"""Cross-entropy of resized scores, computed in strips so that the scores are never stored at full size."""

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..choices import choices_table
from . import cpu, torch_form

__all__ = ['explain', 'resized_cross_entropy']


def resized_cross_entropy(
    scores: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over all pixels, after a bilinear resize of ``scores`` to the size of ``labels``.

    The gradient is computed together with the loss, so only a tensor of the size of ``scores`` is stored. CPUs run
    ``cpu.cpp``, where any number of threads gives the same bits; other devices, float64, and machines without a
    compiler run ``torch_form.py``.

    Args:
        scores: ``[B, K, h, w]``.
        labels: ``[B, H, W]``, int64; pixels with ``ignore_index`` do not count.
        class_weight: factor of each class ``[K]``, or None.
        ignore_index: label of void pixels.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        The sum, and the number of pixels whose class has the largest score; both are scalars, the second one int64.

    Raises:
        IndexError, RuntimeError: a label is neither a class nor ``ignore_index``.
    """
    return _ResizedCrossEntropy.apply(scores, labels, class_weight, ignore_index, align_corners)


def explain() -> str:
    """Table that shows for each device and dtype which form runs, and why ``cpu`` does not."""
    return choices_table(lambda x: 'torch' if cpu.why_not(x) else 'cpu', 'cpu', cpu.why_not)


class _ResizedCrossEntropy(Function):
    @staticmethod
    def forward(ctx, scores, labels, class_weight, ignore_index, align_corners):
        form = torch_form if cpu.why_not(scores) else cpu
        total, correct, gradient = form.compute(
            scores, labels, class_weight, ignore_index, align_corners, ctx.needs_input_grad[0]
        )
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None
