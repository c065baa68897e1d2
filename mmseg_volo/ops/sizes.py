"""Whether torch.export records, and which sizes it leaves open."""

from collections.abc import Sequence

import torch


def is_exporting() -> bool:
    """Whether torch.export records a program.

    ``torch.compiler.is_exporting`` alone is also true while torch.compile traces (torch 2.11).
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_open(*size: int | torch.SymInt) -> bool:
    """Whether a side is left open, so that the recorded program must serve every value."""
    return any(isinstance(side, torch.SymInt) for side in size)


def are_equal(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes are equal; False if one is open, because asking would fix it."""
    return not is_open(*size, *other) and tuple(size) == tuple(other)
