"""Cross-entropy of resized scores, computed in strips so that the scores are never stored at full size."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STRIP = {'cpu': 2**21, 'cuda': 2**26}  # bytes of scores at a time


def resized_cross_entropy(
    scores: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over all pixels, after a bilinear resize of ``scores`` to the size of ``labels``.

    The gradient is computed together with the loss, so only a tensor of the size of ``scores`` is stored.

    Args:
        scores: ``[B, K, h, w]``.
        labels: ``[B, H, W]``, int64; pixels with ``ignore_index`` do not count.
        class_weight: factor of each class ``[K]``, or None.
        ignore_index: label of void pixels.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        The sum, and the number of pixels whose class has the largest score; both are scalars, the second one int64.
    """
    return _ResizedCrossEntropy.apply(scores, labels, class_weight, ignore_index, align_corners)


class _ResizedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, labels, class_weight, ignore_index, align_corners):
        B, K, h, w = scores.shape
        H, W = labels.shape[1:]
        dtype = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
        first, second, fraction = _taps(h, H, align_corners, scores.device, dtype)
        rows = max(1, STRIP.get(scores.device.type, 2**26) // (K * W * dtype.itemsize))
        total, correct = scores.new_zeros((), dtype=dtype), torch.zeros((), dtype=torch.int64, device=scores.device)
        gradient = torch.zeros(scores.shape, dtype=dtype, device=scores.device) if ctx.needs_input_grad[0] else None
        if class_weight is not None:
            class_weight = class_weight.to(dtype)
        for image in range(B):
            low = scores[image].to(dtype).contiguous()
            for y in range(0, H, rows):
                top, bottom, part = first[y : y + rows], second[y : y + rows], fraction[y : y + rows, None]
                tall = low[:, top] * (1 - part) + low[:, bottom] * part  # K, rows, w
                size = tall.shape[1], W
                high = F.interpolate(tall[None], size, mode='bilinear', align_corners=align_corners)[0]
                target = labels[image, y : y + rows]
                valid = target != ignore_index
                index = torch.where(valid, target, 0)[None]
                log = torch.log_softmax(high, 0)
                own = log.gather(0, index)[0]
                weight = valid.to(dtype) if class_weight is None else class_weight[index[0]] * valid
                total -= (torch.where(valid, own, 0) * weight).sum()
                correct += ((own >= log.amax(0)) & valid).sum()
                if gradient is not None:
                    high = log.exp_().scatter_add_(0, index, torch.full_like(own, -1)[None]).mul_(weight)
                    tall = torch.ops.aten.upsample_bilinear2d_backward(
                        high[None], size, (1, *tall.shape), align_corners, None, None
                    )[0]
                    gradient[image].index_add_(1, top, tall * (1 - part)).index_add_(1, bottom, tall * part)
        if gradient is not None:
            ctx.save_for_backward(gradient.to(scores.dtype))
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


def _taps(source: int, target: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> tuple:
    """The two source rows of each target row, and the share of the second one."""
    y = torch.arange(target, dtype=torch.float64, device=device)
    if align_corners:
        position = y * ((source - 1) / (target - 1) if target > 1 else 0)
    else:
        position = ((y + 0.5) * (source / target) - 0.5).clamp(min=0)
    first = position.floor().long().clamp(max=source - 1)
    return first, (first + 1).clamp(max=source - 1), (position - first).to(dtype)
