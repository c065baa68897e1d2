"""The bilinear resize and shift of one axis, as a matrix and as lists of its few non-zero elements."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(256)
def matrices(source: int, target: int, kernel: int, align_corners: bool, dtype: torch.dtype, device: str) -> Tensor:
    """``[kernel, target, source]``: resize an axis, then shift it by -1, 0 and 1 (kernel 3); zeros come in."""
    with torch.inference_mode(False):
        identity = torch.eye(source, dtype=torch.float64)[None]
        resize = F.interpolate(identity, target, mode='linear', align_corners=align_corners)[0].t()
        padded = F.pad(resize, (0, 0, kernel // 2, kernel // 2))
        return torch.stack([padded[k : k + target] for k in range(kernel)]).to(device, dtype)


def both_axes(
    source: Sequence[int], target: Sequence[int], kernel: int, align_corners: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`matrices` of the rows and of the columns, in dtype and on device of ``like``."""
    rows, columns = (
        matrices(before, after, kernel, align_corners, like.dtype, str(like.device))
        for before, after in zip(source, target, strict=True)
    )
    return rows, columns


@lru_cache(256)
def forward_taps(
    source: int, target: int, kernel: int, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Source positions and weights of each target position and shift, ``[target, kernel, 2]`` both."""
    matrix = matrices(source, target, kernel, align_corners, dtype, 'cpu').permute(1, 0, 2)
    weights, positions = F.pad(matrix, (0, max(0, 2 - source))).topk(2)
    return positions.clamp(max=source - 1).to(torch.int32).contiguous(), weights.contiguous()


@lru_cache(256)
def backward_taps(
    source: int, target: int, kernel: int, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Target positions and weights of each source position and shift, one list after another, and where each begins."""
    matrix = matrices(source, target, kernel, align_corners, dtype, 'cpu').permute(2, 0, 1)
    counts = (matrix != 0).sum(2).flatten()
    begins = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return begins, matrix.nonzero()[:, 2].to(torch.int32).contiguous(), matrix[matrix != 0].contiguous()
