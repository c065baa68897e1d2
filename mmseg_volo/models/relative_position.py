"""Bias of attention per relative position of two tokens, for any grid: from a learned table, or from an MLP.

Both return the table that :func:`~mmseg_volo.ops.biased_attention.biased_attention` takes, with the heads last. The
parameters have timm's names.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from .backbone import ResizedPerGrid


class RelativeTable(nn.Module):
    """Bias per relative position from a learned table, resized for other grids than its own."""

    def __init__(self, heads: int, grid: tuple[int, int], resize: Callable[[Tensor, tuple[int, int]], Tensor]):
        super().__init__()
        # timm's [positions, heads] with the positions in rows and columns: a shape tells the grid.
        self.relative_position_bias_table = nn.Parameter(torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.grid = grid
        self._resized = ResizedPerGrid(resize)
        self.register_load_state_dict_pre_hook(_fold_table)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the bias ``[2h - 1, 2w - 1, heads]`` for a ``grid`` of (h, w) tokens."""
        table = self.relative_position_bias_table
        return table if grid == self.grid else self._resized(table, grid)


class RelativeMLP(nn.Module):
    """Bias per relative position from an MLP of the signed logarithm of the offset (timm's rmlp), for any grid."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.mlp = Mlp(2, width, heads, act_layer=nn.ReLU, drop=(0.125, 0.0))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the bias ``[2h - 1, 2w - 1, heads]`` for a ``grid`` of (h, w) tokens."""
        weight = self.mlp.fc1.weight
        offsets = [torch.arange(1 - n, n, device=weight.device, dtype=weight.dtype) for n in grid]
        x = torch.stack(torch.meshgrid(*offsets, indexing='ij'), -1)
        return self.mlp(x.sign() * x.abs().log1p())


def _fold_table(module: Any, state: dict, prefix: str, *_: object) -> None:
    """Give timm's table ``[positions, heads]`` its rows and columns."""
    name = f'{prefix}relative_position_bias_table'
    own = module.relative_position_bias_table
    if name in state and state[name].dim() == 2 and state[name].numel() == own.numel():
        state[name] = state[name].view(own.shape)
