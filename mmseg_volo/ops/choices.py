"""Table of the implementations of an operator."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def choices_table(choose: Callable[[Tensor], str], first: str, why_not: Callable[[Tensor], str | None]) -> str:
    """Table that shows for each device and dtype which implementation runs, and why the first choice does not.

    Args:
        choose: name of the implementation that runs for a tensor ``[B, C, H, W]``.
        first: name of the first choice.
        why_not: reason why the first choice cannot process a tensor, or None.
    """
    from prettytable import PrettyTable

    table = PrettyTable(['device', 'dtype', 'runs', f'why not {first}'], align='l', max_width=60)
    for device in ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]:
        for dtype in DTYPES:
            x = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
            table.add_row([device, str(dtype).removeprefix('torch.'), choose(x), why_not(x) or ''])
    return str(table)
