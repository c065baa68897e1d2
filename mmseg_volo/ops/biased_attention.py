"""Attention with a learned bias per relative position, which never stores a map of all pairs of tokens.

The bias ``[heads, N, N]`` of N tokens repeats the elements of a table. If both the table and the queries are reversed,
query (i, j) and key (i', j') share the element in row i + i' and column j + j', so their bias is a view of the table.
Queries are processed in chunks: the forward pass copies the chunk's part of that view and calls PyTorch's attention;
the backward pass computes the chunk's weights again. The gradient of the table is a sum over diagonals of that of the
scores. If each row starts one element before the end of the last one, diagonals become columns. There are neither
indices nor atomic additions, so two runs give the same bits.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

CHUNK = {'cpu': 2**22, 'cuda': 2**24}  # bytes of scores at a time; on a CPU they should stay in the cache


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    grid: Sequence[int],
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention over all tokens of a grid, with a learned bias per head and relative position.

    Paper: https://arxiv.org/abs/2106.04803, section 2.1. Only the arguments are stored for the backward pass, which
    needs the memory of a few chunks of scores beside its results. Second derivatives need
    :func:`biased_attention_reference`.

    Args:
        q: queries ``[B, heads, h * w, d]``, row by row of the grid.
        k: keys, of the same shape.
        v: values, of the same shape.
        table: ``[heads, 2 * h - 1, 2 * w - 1]``; element ``[:, i - i' + h - 1, j - j' + w - 1]`` is the bias of query
            (i, j) and key (i', j').
        grid: h and w in tokens.
        scale: multiplies the products of queries and keys before the bias is added; None means ``d ** -0.5``.
        dropout: share of the attention weights that are set to zero; the others are divided by 1 - dropout. Above 0,
            :func:`biased_attention_reference` runs, which stores the bias of all pairs of tokens.

    Returns:
        ``[B, heads, h * w, d]``. Under autocast it has autocast's dtype, otherwise that of ``q``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _check(q, k, v, table, tuple(grid))
    if dropout:
        return biased_attention_reference(q, k, v, table, grid=grid, scale=scale, dropout=dropout)
    device = q.device.type
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if device != 'meta' and q.dtype != torch.float64 and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    return biased_attention_op(q, k, v, table, *grid, scale)


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
    """The definition of :func:`biased_attention` in plain PyTorch, with the whole bias; it can be traced."""
    bias = relative_bias(table, grid).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], dropout_p=dropout, scale=scale)


def relative_bias(table: Tensor, grid: Sequence[int]) -> Tensor:
    """The bias of every query and key ``[heads, h * w, h * w]``; see :func:`biased_attention`."""
    rows, columns = (
        (torch.arange(n, device=table.device)[:, None] - torch.arange(n, device=table.device) + n - 1) for n in grid
    )
    bias = table[:, rows][..., columns]  # heads, h, h, w, w
    return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, ...]) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f'grid must be two positive numbers, got {grid}')
    h, w = grid
    if q.dim() != 4 or q.shape[2] != h * w or not q.shape[1] * q.shape[3]:
        raise ValueError(f'q must be [B, heads, {h} * {w}, d] for grid {grid}, got shape {tuple(q.shape)}')
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f'q, k and v must have one shape, got {[tuple(x.shape) for x in (q, k, v)]}')
    if table.shape != (q.shape[1], 2 * h - 1, 2 * w - 1):
        expected = q.shape[1], 2 * h - 1, 2 * w - 1
        raise ValueError(f'table must have shape {expected} for grid {grid}, got {tuple(table.shape)}')
    if len({x.dtype for x in (q, k, v)}) > 1 or not (q.is_floating_point() and table.is_floating_point()):
        dtypes = [str(x.dtype) for x in (q, k, v, table)]
        raise ValueError(f'q, k and v must have one floating-point dtype and table a floating-point one, got {dtypes}')
    if len({x.device for x in (q, k, v, table)}) > 1:
        raise ValueError(f'q, k, v and table must be on one device, got {[str(x.device) for x in (q, k, v, table)]}')


@torch.library.custom_op('mmseg_volo::biased_attention', mutates_args=())
def biased_attention_op(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float
) -> Tensor:
    """Opaque operator for torch.compile, torch.export and autograd."""
    out = q.new_empty(q.shape)
    windows = _windows(table.to(q.dtype), height, width)
    with torch.autocast(q.device.type, enabled=False):
        for images, heads, rows in _groups(q, width, q.dtype):
            queries, keys, values, results = (x[images, heads] for x in (q, k, v, out))
            scratch = q.new_empty(keys.shape[1] * rows * width * keys.shape[2])
            for first in range(0, height, rows):
                bias = windows[heads, first : first + rows]
                bias = _view(scratch, bias.shape).copy_(bias).flatten(3, 4).flatten(1, 2)[None]
                last = height - first
                tokens = slice(max(last - rows, 0) * width, last * width)
                reverse = queries[:, :, tokens].flip(2)
                part = F.scaled_dot_product_attention(reverse, keys, values, attn_mask=bias, scale=scale)
                results[:, :, tokens] = part.flip(2)
    return out


@torch.library.custom_op('mmseg_volo::biased_attention_backward', mutates_args=())
def biased_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and table, with sums in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    dtable = torch.zeros(table.shape, dtype=dtype, device=table.device)
    windows = _windows(table.to(dtype), height, width)
    with torch.autocast(q.device.type, enabled=False):
        for images, heads, rows in _groups(q, width, dtype):
            parts = [x[images, heads] for x in (grad, q, k, v)]
            results = [x[images, heads].view(-1, *q.shape[2:]) for x in gradients]
            sums = [x.to(dtype) for x in results]  # the same memory, if it has that dtype
            _backward(*parts, windows[heads], *sums, dtable[heads], rows, scale)
            for result, found in zip(results, sums, strict=True):
                result.copy_(found)
    return *gradients, dtable.flip(1, 2).to(table.dtype)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dtable: Tensor,
    rows: int,
    scale: float,
) -> None:
    """Write the gradients of q, k and v for some images and heads, and add that of the table to ``dtable``."""
    images, heads, N, _ = q.shape
    _, h, w, _, _ = windows.shape
    grad, q, k, v = (x.flatten(0, 1) for x in (grad, q, k, v))
    k, v = (x.to(dk.dtype).contiguous() for x in (k, v))
    dk.zero_(), dv.zero_()
    size = len(q) * rows * w * N
    scratch, other_scratch, skewed = k.new_empty(size), k.new_empty(size), k.new_zeros(2 * size // images)
    for first in range(0, h, rows):
        bias = windows[:, first : first + rows]
        shape = images, *bias.shape
        last = h - first
        tokens = slice(max(last - rows, 0) * w, last * w)
        queries, dout = (x[:, tokens].flip(1).to(dk.dtype) for x in (q, grad))
        weights = _view(scratch, shape).copy_(bias).view(len(q), -1, N)
        weights.baddbmm_(queries, k.mT, alpha=scale)
        torch.softmax(weights, -1, out=weights)
        dv.baddbmm_(weights.mT, dout)
        dscores = torch.bmm(dout, v.mT, out=_view(other_scratch, weights.shape))
        torch.ops.aten._softmax_backward_data.out(dscores, weights, -1, dscores.dtype, grad_input=dscores)
        dq[:, tokens] = (dscores @ k).flip(1).mul_(scale)
        dk.baddbmm_(dscores.mT, queries, alpha=scale)
        _add_diagonals(dtable, dscores.view(shape), skewed, first)


def _add_diagonals(dtable: Tensor, dscores: Tensor, skewed: Tensor, first: int) -> None:
    """Add the gradient of the scores ``[images, heads, rows, w, h, w]`` to ``dtable[:, i + i', j + j']``.

    Args:
        skewed: zeros, at least twice as many as ``dscores`` has elements per image. The second half of each row of
            2 w elements stays zero.
        first: first row of queries.
    """
    images, heads, rows, w, h, _ = dscores.shape
    target = _view(skewed, (heads, rows, w, h, 2 * w))[..., :w]
    target.copy_(dscores[0]) if images == 1 else torch.sum(dscores, 0, out=target)
    # Row j starts j elements earlier, so that column c holds element c - j, or a zero of this row or the one before.
    line = h * 2 * w
    diagonals = skewed.as_strided((heads, rows, w, h, 2 * w - 1), (rows * w * line, w * line, line - 1, 2 * w, 1))
    sums = diagonals.sum(2)  # heads, rows, h, 2 w - 1
    for row in range(rows):
        dtable[:, first + row : first + row + h] += sums[:, row]


def _windows(table: Tensor, h: int, w: int) -> Tensor:
    """View ``[heads, h, w, h, w]`` of the reversed table: element [:, i, j, i', j'] is in row i + i', column j + j'."""
    return table.flip(1, 2).unfold(1, h, 1).unfold(2, w, 1)


def _groups(q: Tensor, width: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, int]]:
    """Images, heads and number of grid rows to process together; several images only if all their rows fit."""
    B, heads, N, _ = q.shape
    fit = CHUNK.get(q.device.type, 2**24) // (width * N * dtype.itemsize)  # rows of one head
    some_heads = max(1, min(fit, heads))
    rows = max(1, min(fit // some_heads, N // width))
    images = max(1, fit // (heads * N // width))
    for image in range(0, B, images):
        for head in range(0, heads, some_heads):
            yield slice(image, image + images), slice(head, head + some_heads), rows


def _view(scratch: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of ``scratch`` in this shape."""
    return scratch[: math.prod(shape)].view(*shape)


@biased_attention_op.register_fake
def _(q, k, v, table, height, width, scale):
    return q.new_empty(q.shape)


@biased_attention_backward_op.register_fake
def _(grad, q, k, v, table, height, width, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, table))


@register_flop_formula(torch.ops.mmseg_volo.biased_attention)
def _flops(q_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations per multiply-add of the two products, as torch counts attention."""
    B, heads, N, d = q_shape
    return 4 * B * heads * N * N * d


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[4:]


def _differentiate(ctx, grad: Tensor):
    return *biased_attention_backward_op(grad, *ctx.saved_tensors, *ctx.geometry), None, None, None


biased_attention_op.register_autograd(_differentiate, setup_context=_save)
