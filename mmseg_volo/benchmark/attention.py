"""Speed and memory of attention with relative bias, against timm's and FlexAttention."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import Tensor
from tqdm import tqdm

from ..ops import biased_attention
from .memory import peak_bytes
from .segmentor import autocast
from .tables import memory_row, parity_row, time_row
from .timing import paired_times

HEADS, HEAD_WIDTH = 12, 32  # CoAtNet-0 at stride 16
TIMED = (32, 64)  # tokens of 512 x 1024 pixels
LARGE = (64, 64)  # tokens of 1024 x 1024 pixels
PARITY = [(13, 20), TIMED]
ROUNDS = 7

Attention = Callable[[Tensor], Tensor]


class AttentionBench:
    """Ours, timm's two forms and, on a GPU, FlexAttention, for one image."""

    def __init__(self, device: str, quick: bool):
        self.device = device
        self.rounds = ROUNDS if quick or device == 'cuda' else 2 * ROUNDS + 1
        self.dtype = torch.bfloat16 if device == 'cuda' else torch.float32

    def parity(self) -> list[dict]:
        """Errors of ours and timm's against timm's in float64: output and gradients."""
        rows = []
        for grid in PARITY:
            exact = _results(*self.cells(grid, torch.float64)['timm'], grid)
            ours, theirs = (_results(*self.cells(grid, self.dtype)[name], grid) for name in ('ours', 'timm'))
            label = f'attention {grid[0]}x{grid[1]}'
            rows += [parity_row(f'{label}: {what}', ours[what], theirs[what], exact[what]) for what in exact]
        return rows

    def measure(self) -> list[dict]:
        """Times of forward pass and train step, and the peak memory of a train step."""
        cells = [('forward', _forward, TIMED), ('train step', _step, TIMED)]
        rows = []
        for what, run, grid in tqdm(cells, desc='attention', leave=False):
            runs = {name: partial(run, *cell) for name, cell in self.cells(grid, self.dtype).items()}
            times = paired_times(runs, self.rounds, self.device)
            rows.append(time_row(f'{what} {grid[0]}x{grid[1]}', times))
        peaks = {
            name: peak_bytes(partial(_step, *cell), self.device) for name, cell in self.cells(LARGE, self.dtype).items()
        }
        return [*rows, memory_row(f'peak of a train step {LARGE[0]}x{LARGE[1]}', peaks)]

    def cells(self, grid: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple]:
        """Each form with its table, packed queries, keys and values, and a cotangent; the numbers are the same."""
        torch.manual_seed(0)
        relative = RelPosBias(grid, HEADS).to(self.device)
        tensors = torch.randn(4, 1, HEADS, grid[0] * grid[1], HEAD_WIDTH, device=self.device).to(dtype)
        if dtype == torch.float64:
            tensors, relative = tensors.to(self.dtype).double(), relative.double()
        qkv, cotangent = tensors[:3].requires_grad_(), tensors[3]
        theirs = relative.relative_position_bias_table
        table = _table(theirs.detach(), grid).clone().requires_grad_()
        cells: dict[str, tuple[Attention, Tensor]] = {
            'ours': (lambda qkv: biased_attention(qkv, table, grid=grid), table),
            'timm': (lambda qkv: F.scaled_dot_product_attention(*qkv.unbind(0), relative.get_bias()), theirs),
            'timm unfused': (lambda qkv: _unfused(*qkv.unbind(0), relative.get_bias()), theirs),
        }
        if self.device == 'cuda':
            cells['flex'] = lambda qkv: flex_attention(*qkv.unbind(0), table, grid, compiled=True), table
        return {name: (self._autocast(attention), own, qkv, cotangent) for name, (attention, own) in cells.items()}

    def _autocast(self, attention: Attention) -> Attention:
        def run(qkv: Tensor) -> Tensor:
            if qkv.dtype == torch.float64:
                return attention(qkv)
            with autocast(self.device):
                return attention(qkv)

        return run


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, int], compiled: bool = False
) -> Tensor:
    """The same with PyTorch's FlexAttention, which has no backward pass on a CPU."""
    h, w = grid

    def add_bias(score, batch, head, query, key):
        return score + table[head, query // w - key // w + h - 1, query % w - key % w + w - 1]

    return _flex(compiled)(q, k, v, score_mod=add_bias)


@lru_cache
def _flex(compiled: bool) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _unfused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As timm computes it where fused attention is off."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
    return scores.softmax(-1) @ v


def _forward(attention: Attention, table: Tensor, qkv: Tensor, cotangent: Tensor) -> None:
    with torch.no_grad():
        attention(qkv)


def _step(attention: Attention, table: Tensor, qkv: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of queries, keys and values, and of the table."""
    output = attention(qkv)
    return output, *torch.autograd.grad(output, [qkv, table], cotangent)


def _results(attention: Attention, table: Tensor, qkv: Tensor, cotangent: Tensor, grid: tuple) -> dict:
    output, dqkv, dtable = _step(attention, table, qkv, cotangent)
    if dtable.dim() == 2:
        dtable = _table(dtable, grid)
    return {'output': output.detach(), **dict(zip(('d q', 'd k', 'd v'), dqkv, strict=True)), 'd table': dtable}


def _table(theirs: Tensor, grid: tuple[int, int]) -> Tensor:
    """timm's table ``[(2 h - 1) (2 w - 1), heads]`` as ours."""
    h, w = grid
    return theirs.t().reshape(-1, 2 * h - 1, 2 * w - 1)
