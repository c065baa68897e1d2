"""Sizes that torch.export may leave open."""

from collections.abc import Sequence

import torch


def is_open(*size: int | torch.SymInt) -> bool:
    """Whether a side is left open, so that the recorded program must serve every value."""
    return any(isinstance(side, torch.SymInt) for side in size)


def are_equal(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes are equal; False if one is open, because asking would fix it."""
    return not is_open(*size, *other) and tuple(size) == tuple(other)
