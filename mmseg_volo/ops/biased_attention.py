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

from .sizes import is_exporting

# Bytes of scores at a time: on a CPU they should stay in the cache, on a GPU few kernels should do much work.
CHUNK = {'cpu': 2**22, 'cuda': 2**27}


def biased_attention(
    qkv: Tensor, table: Tensor, *, grid: Sequence[int], scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention over all tokens of a grid, with a learned bias per head and relative position.

    Paper: https://arxiv.org/abs/2106.04803, section 2.1. Only the arguments are stored for the backward pass, which
    needs the memory of a few chunks of scores beside its results. Second derivatives need
    :func:`biased_attention_reference`.

    Args:
        qkv: queries, keys and values ``[3, B, heads, h * w, d]``, row by row of the grid. The gradient has the same
            strides, so that a view of a linear layer's output costs no copy.
        table: ``[heads, 2 * h - 1, 2 * w - 1]``; element ``[:, i - i' + h - 1, j - j' + w - 1]`` is the bias of query
            (i, j) and key (i', j').
        grid: h and w in tokens.
        scale: multiplies the products of queries and keys before the bias is added; None means ``d ** -0.5``.
        dropout: share of the attention weights that are set to zero; the others are divided by 1 - dropout. Above 0,
            :func:`biased_attention_reference` runs, which stores the bias of all pairs of tokens.

    Returns:
        ``[B, heads, h * w, d]``, the transpose of a contiguous ``[B, h * w, heads, d]``. Under autocast it has
        autocast's dtype, otherwise that of ``qkv``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _check(qkv, table, tuple(grid))
    if dropout or is_exporting():
        return biased_attention_reference(qkv, table, grid=grid, scale=scale, dropout=dropout)
    device = qkv.device.type
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if device != 'meta' and qkv.dtype != torch.float64 and torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    return biased_attention_op(qkv, table, *grid, scale)


def biased_attention_reference(
    qkv: Tensor, table: Tensor, *, grid: Sequence[int], scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The definition of :func:`biased_attention` in plain PyTorch, with the whole bias; it can be traced."""
    bias = relative_bias(table, grid).to(qkv.dtype)
    return F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias[None], dropout_p=dropout, scale=scale)


def relative_bias(table: Tensor, grid: Sequence[int]) -> Tensor:
    """The bias of every query and key ``[heads, h * w, h * w]``; see :func:`biased_attention`."""
    rows, columns = (
        (torch.arange(n, device=table.device)[:, None] - torch.arange(n, device=table.device) + n - 1) for n in grid
    )
    bias = table[:, rows][..., columns]  # heads, h, h, w, w
    return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _check(qkv: Tensor, table: Tensor, grid: tuple[int, ...]) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f'grid must be two positive numbers, got {grid}')
    h, w = grid
    if qkv.dim() != 5 or len(qkv) != 3 or qkv.shape[3] != h * w or not qkv.shape[2] * qkv.shape[4]:
        raise ValueError(f'qkv must be [3, B, heads, {h} * {w}, d] for grid {grid}, got shape {tuple(qkv.shape)}')
    expected = qkv.shape[2], 2 * h - 1, 2 * w - 1
    if table.shape != expected:
        raise ValueError(f'table must have shape {expected} for grid {grid}, got {tuple(table.shape)}')
    if not (qkv.is_floating_point() and table.is_floating_point()):
        raise ValueError(f'qkv and table must have floating-point dtypes, got {qkv.dtype} and {table.dtype}')
    if qkv.device != table.device:
        raise ValueError(f'qkv and table must be on one device, got {qkv.device} and {table.device}')


@torch.library.custom_op('mmseg_volo::biased_attention', mutates_args=())
def biased_attention_op(qkv: Tensor, table: Tensor, height: int, width: int, scale: float) -> Tensor:
    """Opaque operator for torch.compile, torch.export and autograd."""
    out = _empty_output(qkv)
    windows = _windows(table.to(qkv.dtype), height, width)
    with torch.autocast(qkv.device.type, enabled=False):
        for images, heads, rows in _groups(qkv, width, qkv.dtype):
            queries, keys, values = qkv[:, images, heads]
            results = out[images, heads]
            scratch = qkv.new_empty(keys.shape[1] * rows * width * keys.shape[2])
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
    grad: Tensor, qkv: Tensor, table: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and table, with sums in at least float32."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    dqkv = torch.empty_like(qkv)
    dtable = torch.zeros(table.shape, dtype=dtype, device=table.device)
    windows = _windows(table.to(dtype), height, width)
    with torch.autocast(qkv.device.type, enabled=False):
        for images, heads, rows in _groups(qkv, width, dtype):
            some = qkv[:, images, heads], dqkv[:, images, heads]
            _backward(grad[images, heads], *some, windows[heads], dtable[heads], rows, scale)
    return dqkv, dtable.flip(1, 2).to(table.dtype)


def _backward(
    grad: Tensor, qkv: Tensor, dqkv: Tensor, windows: Tensor, dtable: Tensor, rows: int, scale: float
) -> None:
    """Write the gradient for some images and heads to ``dqkv``, and add that of the table to ``dtable``."""
    _, images, heads, N, _ = qkv.shape
    _, h, w, _, _ = windows.shape
    k, v = (x.flatten(0, 1).to(dtable.dtype).contiguous() for x in qkv[1:])
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    size = len(k) * rows * w * N
    scratch, other_scratch, skewed = k.new_empty(size), k.new_empty(size), k.new_zeros(2 * size // images)
    for first in range(0, h, rows):
        bias = windows[:, first : first + rows]
        shape = images, *bias.shape
        last = h - first
        tokens = slice(max(last - rows, 0) * w, last * w)
        q, dout = (x[:, :, tokens].flip(2).flatten(0, 1).to(k.dtype) for x in (qkv[0], grad))
        weights = _view(scratch, shape).copy_(bias).view(len(k), -1, N)
        weights.baddbmm_(q, k.mT, alpha=scale)
        torch.softmax(weights, -1, out=weights)
        dv.baddbmm_(weights.mT, dout)
        dscores = torch.bmm(dout, v.mT, out=_view(other_scratch, weights.shape))
        torch.ops.aten._softmax_backward_data.out(dscores, weights, -1, dscores.dtype, grad_input=dscores)
        dqkv[0][:, :, tokens] = (dscores @ k).mul_(scale).unflatten(0, (images, heads)).flip(2)
        dk.baddbmm_(dscores.mT, q, alpha=scale)
        _add_diagonals(dtable, dscores.view(shape), skewed, first)
    for gradient, found in zip(dqkv[1:], (dk, dv), strict=True):
        gradient.copy_(found.view(gradient.shape))


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


def _groups(qkv: Tensor, width: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, int]]:
    """Images, heads and number of grid rows to process together; several images only if all their rows fit."""
    _, B, heads, N, _ = qkv.shape
    fit = CHUNK.get(qkv.device.type, 2**24) // (width * N * dtype.itemsize)  # rows of one head
    some_heads = max(1, min(fit, heads))
    rows = max(1, min(fit // some_heads, N // width))
    images = max(1, fit // (heads * N // width))
    for image in range(0, B, images):
        for head in range(0, heads, some_heads):
            yield slice(image, image + images), slice(head, head + some_heads), rows


def _view(scratch: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of ``scratch`` in this shape."""
    return scratch[: math.prod(shape)].view(*shape)


def _empty_output(qkv: Tensor) -> Tensor:
    _, B, heads, N, d = qkv.shape
    return qkv.new_empty(B, N, heads, d).transpose(1, 2)


@biased_attention_op.register_fake
def _(qkv, table, height, width, scale):
    return _empty_output(qkv)


@biased_attention_backward_op.register_fake
def _(grad, qkv, table, height, width, scale):
    return torch.empty_like(qkv), table.new_empty(table.shape)


@register_flop_formula(torch.ops.mmseg_volo.biased_attention)
def _flops(qkv_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations per multiply-add of the two products, as torch counts attention."""
    _, B, heads, N, d = qkv_shape
    return 4 * B * heads * N * N * d


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[2:]


def _differentiate(ctx, grad: Tensor):
    return *biased_attention_backward_op(grad, *ctx.saved_tensors, *ctx.geometry), None, None, None


biased_attention_op.register_autograd(_differentiate, setup_context=_save)
