"""Loss and gradient in PyTorch, for every device and dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .taps import taps

STRIP = {'cpu': 2**21, 'cuda': 2**26}  # bytes of scores at a time


def why_not(scores: Tensor) -> None:
    """Return None: every device and dtype is supported."""


def compute(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of the losses, number of correct pixels, and the gradient of the sum, ``[B, K, h, w]`` in scores' dtype."""
    B, K, h, w = scores.shape
    H, W = labels.shape[1:]
    dtype = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    first, second, fraction = taps(h, H, align_corners, scores.device, dtype)
    rows = max(1, STRIP.get(scores.device.type, 2**26) // (K * W * dtype.itemsize))
    total, correct = scores.new_zeros((), dtype=dtype), torch.zeros((), dtype=torch.int64, device=scores.device)
    gradient = torch.zeros(scores.shape, dtype=dtype, device=scores.device) if need_gradient else None
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
    return total, correct, None if gradient is None else gradient.to(scores.dtype)
