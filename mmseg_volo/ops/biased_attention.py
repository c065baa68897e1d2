"""Attention with a learned bias per relative position."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, grid: Sequence[int], scale: float | None = None
) -> Tensor:
    """Softmax attention over all tokens of a grid, with a learned bias per head and relative position.

    Args:
        q: queries ``[B, heads, h * w, d]``, row by row of the grid.
        k: keys, of the same shape.
        v: values, of the same shape.
        table: ``[heads, 2 * h - 1, 2 * w - 1]``; element ``[:, i - i' + h - 1, j - j' + w - 1]`` is the bias of query
            (i, j) and key (i', j').
        grid: h and w in tokens.
        scale: multiplies the products of queries and keys before the bias is added; None means ``d ** -0.5``.
    """
    return biased_attention_reference(q, k, v, table, grid=grid, scale=scale)


def biased_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    grid: Sequence[int],
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`biased_attention` with the whole bias in memory, and ``dropout`` of the attention weights."""
    h, w = grid
    rows, columns = (torch.arange(n, device=q.device) for n in grid)
    rows = rows[:, None, None, None] - rows[None, None, :, None] + h - 1
    columns = columns[None, :, None, None] - columns[None, None, None, :] + w - 1
    bias = table[:, rows, columns].reshape(-1, h * w, h * w).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
