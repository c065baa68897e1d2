"""Outlook attention in Triton, for GPUs: window 3, stride 2.

The first kernel computes the softmax of the logits. The second gathers tokens: it computes the output and the gradient
of value. The third computes the gradient of the logits. No two programs write to the same address, so there are no
atomics and every run gives the same bits.

``ops/outlook/README.md`` explains the shape letters. The centre of window (i, j) is token (2i, 2j). Tap 9 u + v of a
window is the weight with which position v contributes to position u. Block (i, j) consists of the tokens (2i, 2j) to
(2i + 1, 2j + 1), which windows (i, j) to (i + 1, j + 1) cover.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_WIDTHS = (8, 16, 32, 64, 128)
TAPS = tl.constexpr(81)
# The weights have shape [N, tiles, TAPS, TILE]. Windows are last, so the distance between two taps is a constant.
TILE = tl.constexpr(16)
SOFTMAX_WINDOWS = 64


@triton.jit
def _weights_at(weights, window, n, tiles):
    """Pointers to tap 0 of each window; consecutive taps of a window are TILE elements apart."""
    return weights + (n.to(tl.int64) * tiles + window // TILE) * (TAPS * TILE) + window % TILE


@triton.jit(do_not_specialize=['tiles'])
def softmax_kernel(logits, weights, windows, window_stride, tap_stride, tiles, scale_log2e, BLOCK: tl.constexpr):
    """Softmax over the 9 taps of one position, for one head and BLOCK windows.

    Triton's ranges are powers of two, so the first eight taps are one tensor and the last tap is another.
    """
    window = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, place = tl.program_id(1) // 9, tl.program_id(1) % 9
    tap = place * 9 + tl.arange(0, 8)[:, None]  # 8, 1
    real = window < windows
    at = logits + n.to(tl.int64) * TAPS * tap_stride + window * window_stride
    eight = tl.load(at[None, :] + tap.to(tl.int64) * tap_stride, mask=real[None, :], other=0.0)  # 8, BLOCK
    last = tl.load(at + (place * 9 + 8).to(tl.int64) * tap_stride, mask=real, other=0.0)
    eight, last = eight.to(tl.float32) * scale_log2e, last.to(tl.float32) * scale_log2e
    largest = tl.maximum(tl.max(eight, 0), last)
    eight, last = tl.exp2(eight - largest[None, :]), tl.exp2(last - largest)
    total = tl.sum(eight, 0) + last
    at = _weights_at(weights, window, n, tiles)
    dtype: tl.constexpr = weights.dtype.element_ty
    tl.store(at[None, :] + tap * TILE, (eight / total[None, :]).to(dtype), mask=real[None, :])
    tl.store(at + (place * 9 + 8) * TILE, (last / total).to(dtype), mask=real)


@triton.jit
def _program(w, BW: tl.constexpr):
    """This program's row of windows (counted through the batch), its columns of windows ``[BW]`` and its head."""
    columns = tl.cdiv(w, BW)
    row, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    return row, column * BW + tl.arange(0, BW), tl.program_id(1)


@triton.jit
def _offsets(row, j, n, H, W, h, N: tl.constexpr, D: tl.constexpr):
    """Offsets of head n of the tokens (2i, 2j): ``[BW, D]``."""
    token = ((row // h).to(tl.int64) * H + row % h * 2) * W + j * 2
    return token[:, None] * (N * D) + n * D + tl.arange(0, D)[None, :]


@triton.jit
def _inside(row, j, y: tl.constexpr, x: tl.constexpr, H, W, h):
    """Whether the tokens (2i + y, 2j + x) are inside the feature map: ``[BW, 1]``."""
    top, left = row % h * 2 + y, j * 2 + x
    return ((top >= 0) & (top < H) & (left >= 0) & (left < W))[:, None]


@triton.jit
def _tokens(at, row, j, y: tl.constexpr, x: tl.constexpr, H, W, h, C: tl.constexpr):
    """Tokens (2i + y, 2j + x), zero outside the feature map: ``[BW, D]``."""
    return tl.load(at + (W.to(tl.int64) * y + x) * C, mask=_inside(row, j, y, x, H, W, h), other=0.0)


@triton.jit
def _add(
    out, tokens, at, real,
    Y: tl.constexpr, X: tl.constexpr, y: tl.constexpr, x: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Add to ``out``, the tokens (2i + Y, 2j + X), the contribution of the tokens (2i + y, 2j + x).

    The contribution is summed over all windows that contain both tokens.
    """
    # Those windows are (i + a, j + b) with a and b 0 or 1. Window row i covers y up to 1, window row i + 1 y from 1 on.
    A0: tl.constexpr = y > 1
    A1: tl.constexpr = y > 0 and Y > 0
    B0: tl.constexpr = x > 1
    B1: tl.constexpr = x > 0 and X > 0
    if A0 <= A1 and B0 <= B1:
        for a in tl.static_range(A0, A1 + 1):
            for b in tl.static_range(B0, B1 + 1):
                to = (Y - 2 * a + 1) * 3 + X - 2 * b + 1
                source = (y - 2 * a + 1) * 3 + x - 2 * b + 1
                tap = source * 9 + to if TRANSPOSED else to * 9 + source
                one = tl.load(at[a][b] + tap * TILE, mask=real[a][b], other=0.0).to(tl.float32)
                if a == A0 and b == B0:
                    weight = one
                else:
                    weight += one
        out += weight[:, None] * tokens
    return out


# Without do_not_specialize Triton compiles again for some sizes.
@triton.jit(do_not_specialize=['H', 'W', 'h', 'w', 'tiles'])
def gather_kernel(
    value, weights, out, H, W, h, w, tiles,
    N: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Output of one head for BW blocks of a row. Each of the 25 tokens that a block depends on is read once.

    If TRANSPOSED, every 9 x 9 matrix of weights is transposed: given the output's gradient as ``value``, the result is
    the gradient of value.
    """
    row, j, n = _program(w, BW)
    offsets = _offsets(row, j, n, H, W, h, N, D)
    window = row.to(tl.int64) * w + j
    top = _weights_at(weights, window, n, tiles), _weights_at(weights, window + 1, n, tiles)
    bottom = _weights_at(weights, window + w, n, tiles), _weights_at(weights, window + w + 1, n, tiles)
    at = top, bottom
    below = row % h + 1 < h
    real = (j < w, j + 1 < w), (below & (j < w), below & (j + 1 < w))
    out00 = tl.zeros((BW, D), tl.float32)
    out01 = tl.zeros((BW, D), tl.float32)
    out10 = tl.zeros((BW, D), tl.float32)
    out11 = tl.zeros((BW, D), tl.float32)
    for y in tl.static_range(-1, 4):
        for x in tl.static_range(-1, 4):
            tokens = _tokens(value + offsets, row, j, y, x, H, W, h, N * D).to(tl.float32)
            out00 = _add(out00, tokens, at, real, 0, 0, y, x, TRANSPOSED)
            out01 = _add(out01, tokens, at, real, 0, 1, y, x, TRANSPOSED)
            out10 = _add(out10, tokens, at, real, 1, 0, y, x, TRANSPOSED)
            out11 = _add(out11, tokens, at, real, 1, 1, y, x, TRANSPOSED)
    block = (out00, out01), (out10, out11)
    for y in tl.static_range(2):
        for x in tl.static_range(2):
            to = out + offsets + (W.to(tl.int64) * y + x) * (N * D)
            tl.store(to, block[y][x].to(out.dtype.element_ty), mask=_inside(row, j, y, x, H, W, h))


@triton.jit(do_not_specialize=['H', 'W', 'h', 'w', 'tiles'])
def dlogits_kernel(
    grad, value, weights, dlogits, H, W, h, w, tiles, window_stride, tap_stride, scale,
    N: tl.constexpr, D: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of one head for BW windows of a row."""
    row, j, n = _program(w, BW)
    offsets = _offsets(row, j, n, H, W, h, N, D)
    window = row.to(tl.int64) * w + j
    at = _weights_at(weights, window, n, tiles)
    to = dlogits + window * window_stride + n.to(tl.int64) * TAPS * tap_stride
    place = tl.arange(0, 16)[None, :]
    real = (j < w)[:, None] & (place < 9)
    values = ()
    for v in tl.static_range(9):
        values += (_tokens(value + offsets, row, j, v // 3 - 1, v % 3 - 1, H, W, h, N * D),)
    for u in tl.static_range(9):
        dmixed = _tokens(grad + offsets, row, j, u // 3 - 1, u % 3 - 1, H, W, h, N * D).to(tl.float32)
        dshares = tl.zeros((BW, 16), tl.float32)
        for v in tl.static_range(9):
            dshare = tl.sum(dmixed * values[v].to(tl.float32), 1)
            dshares = tl.where(place == v, dshare[:, None], dshares)
        shares = tl.load(at[:, None] + (u * 9 + place) * TILE, mask=real, other=0.0).to(tl.float32)
        mean = tl.sum(shares * dshares, 1)[:, None]
        gradient = shares * (dshares - mean) * scale
        tap = (u * 9 + place).to(tl.int64)
        tl.store(to[:, None] + tap * tap_stride, gradient.to(dlogits.dtype.element_ty), mask=real)


# If TRITON_INTERPRET=1 was set before the import, triton.jit returns an interpreted function, which runs on a CPU.
INTERPRETED = not isinstance(gather_kernel, triton.runtime.JITFunction)


def why_not(logits: Tensor, value: Tensor, kernel_size: int, stride: int) -> str | None:
    """Reason why this implementation cannot process these tensors, or None."""
    if value.device.type != 'cuda' and not (INTERPRETED and value.device.type == 'cpu'):
        return f'the tensors are on {value.device}'
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3):
        return f'triton {triton.__version__} is older than 3.3'
    if (kernel_size, stride) != (3, 2):
        return f'it supports only window 3 with stride 2, not {kernel_size} with {stride}'
    if value.dtype not in DTYPES or logits.dtype != value.dtype:
        return (
            f'it supports only float32, float16 and bfloat16, the same for both, not {logits.dtype} with {value.dtype}'
        )
    head_width = value.shape[-1] // logits.shape[3]
    if head_width not in HEAD_WIDTHS:
        return f'it supports only head widths {", ".join(map(str, HEAD_WIDTHS))}, not {head_width}'
    if value.device.type == 'cuda' and torch.cuda.get_device_capability(value.device) < (8, 0):
        return f'{torch.cuda.get_device_name(value.device)} is older than compute capability 8.0'
    return None


def forward(logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """See :func:`mmseg_volo.ops.outlook_attention`."""
    with torch.cuda.device_of(value):
        return _gather(value.contiguous(), _weights(logits, scale), logits, transposed=False)


def backward(
    grad: Tensor, logits: Tensor, value: Tensor, kernel_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and value; the gradient of the logits has the strides of the logits."""
    grad, value = grad.contiguous(), value.contiguous()
    with torch.cuda.device_of(value):
        weights = _weights(logits, scale)
        dvalue = _gather(grad, weights, logits, transposed=True)
        dlogits = torch.empty_like(logits)
        flat = _flat(dlogits)
        args = (grad, value, weights, flat, *_sizes(logits, value), weights.shape[1], *flat.stride(), scale)
        _launch(dlogits_kernel, logits, value, *args)
    if flat.data_ptr() != dlogits.data_ptr():
        dlogits.copy_(flat.view_as(dlogits))
    return dlogits, dvalue


def _weights(logits: Tensor, scale: float) -> Tensor:
    """Softmax of the logits: ``[N, tiles, TAPS, TILE]``.

    This is a separate kernel, because d / 8 threads of the other kernels share a window and each would repeat the work.
    """
    flat = _flat(logits)
    windows, N = len(flat), logits.shape[3]
    tile = TILE.value
    weights = torch.empty(N, triton.cdiv(windows, tile), TAPS.value, tile, dtype=logits.dtype, device=logits.device)
    grid = (triton.cdiv(windows, SOFTMAX_WINDOWS), N * 9)
    args = (flat, weights, windows, *flat.stride(), weights.shape[1], scale * math.log2(math.e))
    softmax_kernel[grid](*args, BLOCK=SOFTMAX_WINDOWS, num_warps=1)  # with one warp no sum crosses warps
    return weights


def _gather(value: Tensor, weights: Tensor, logits: Tensor, transposed: bool) -> Tensor:
    out = torch.empty_like(value)
    args = (value, weights, out, *_sizes(logits, value), weights.shape[1])
    _launch(gather_kernel, logits, value, *args, TRANSPOSED=transposed)
    return out


def _flat(logits: Tensor) -> Tensor:
    """The logits as ``[B h w, N K K]``, a view where the strides allow it."""
    B, h, w, N, K, _ = logits.shape
    return logits.reshape(B * h * w, N * K * K)


def _sizes(logits: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """H, W, h, w."""
    return *value.shape[1:3], *logits.shape[1:3]


def _launch(kernel, logits: Tensor, value: Tensor, *args, **constants) -> None:
    B, h, w, N, _, _ = logits.shape
    d = value.shape[-1] // N
    block, warps = blocks(kernel, d)
    kernel[(triton.cdiv(w, block) * B * h, N)](*args, N=N, D=d, BW=block, num_warps=warps, **constants)


def blocks(kernel, head_width: int) -> tuple[int, int]:
    """Columns of windows and number of warps of a program, with 8 elements of a token per thread.

    They were the fastest of 11 choices (gather) and 8 (gradient of the logits) for D1 at 512 on an H100. An autotuner
    could choose differently in the next run, and then the last bits differ.
    """
    warps = 1 if kernel is dlogits_kernel else 4
    return 8 * 32 * warps // head_width, warps
