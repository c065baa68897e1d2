"""Tables of relative position biases, resized for another grid of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import are_equal, is_open

LONGEST = 256  # tokens along one side of a grid that torch.export leaves open


def resize_geometric(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a table of relative biases so that nearby tokens keep theirs, as BEiT and timm do.

    The entries are taken as samples at distances 0, 1, 1 + q, 1 + q + q^2, ... tokens, where q, from 1.01 to 1.5, makes
    the last distance that of the new grid. Between the samples the bias is linear, beyond them constant.

    Args:
        table: ``[2h - 1, 2w - 1, heads]``, or ``[positions, heads]`` of a square grid.
        grid: new (h, w).

    Returns:
        The table for ``grid``, ``[2h - 1, 2w - 1, heads]``, in the same dtype.
    """
    exact = _exact(table)
    if are_equal(grid, table_grid(exact)):
        return exact.to(table.dtype)
    rows, columns = (_interpolation(old, 2 * new - 1).to(exact) for old, new in zip(exact.shape[:2], grid, strict=True))
    return torch.einsum('yh,hwn,xw->yxn', rows, exact, columns).contiguous().to(table.dtype)


def resize_bilinear(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a table of relative biases bilinearly, as the paper does; arguments as in ``resize_geometric``."""
    size = tuple(2 * n - 1 for n in grid)
    resized = F.interpolate(_exact(table).permute(2, 0, 1)[None], size=size, mode='bilinear', align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous().to(table.dtype)


def _exact(table: Tensor) -> Tensor:
    """``table`` as ``[2h - 1, 2w - 1, heads]`` in float32 or float64."""
    grid = table_grid(table)
    table = table.view(2 * grid[0] - 1, 2 * grid[1] - 1, -1) if grid and table.dim() == 2 else table
    return table if table.dtype == torch.float64 else table.float()


def table_grid(table: Tensor) -> tuple[int, int] | None:
    """Grid (h, w) of a table ``[2h - 1, 2w - 1, heads]``, or of a square grid's ``[positions, heads]``."""
    if table.dim() == 3 and table.numel():
        return (table.shape[0] + 1) // 2, (table.shape[1] + 1) // 2
    side = round(len(table) ** 0.5) if table.dim() == 2 else 0
    return ((side + 1) // 2,) * 2 if side % 2 and side * side == len(table) else None


def _interpolation(old: int, new: int) -> Tensor:
    """Matrix ``[new, old]`` in float64 that resizes one axis of a table geometrically."""
    if is_open(new):
        samples = torch.tensor([_samples(old, half) for half in range(LONGEST)], dtype=torch.float64)[new // 2]
    else:
        samples = torch.tensor(_samples(old, new // 2), dtype=torch.float64)
    wanted = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64).clamp(samples[0], samples[-1])
    if old == 1:
        return wanted.new_ones(new, 1)
    right = (samples < wanted[:, None]).sum(1).clamp(1, old - 1)
    share = (wanted - samples[right - 1]) / (samples[right] - samples[right - 1])
    place = torch.arange(old) - right[:, None]
    return torch.where(place == 0, share[:, None], torch.where(place == -1, 1 - share[:, None], 0.0))


def _samples(old: int, half: int) -> list[float]:
    """Distances in tokens of the ``old`` samples of a table for a grid of ``half + 1`` tokens."""
    n, low, high = old // 2, 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**n) / (1 - q) > half else (q, high)
    distances = [(1 - q**i) / (1 - q) for i in range(1, n + 1)]
    return [*(-x for x in reversed(distances)), 0.0, *distances]
