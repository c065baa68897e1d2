"""Rows of the tables: errors, times as ratios, and memory."""

import statistics

import torch
from prettytable import PrettyTable
from torch import Tensor


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest exact value; infinite if ``found`` is not finite."""
    if not torch.isfinite(found).all():  # max() would hide a NaN
        return float('inf')
    return ((found.double() - exact.double()).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def parity_row(what: str, ours: Tensor, theirs: Tensor, exact: Tensor, name: str = 'timm') -> dict:
    """Parity allows at most twice the error of ``theirs``, or the tolerance of the dtype."""
    floor = 4e-3 if ours.dtype == torch.bfloat16 else 1e-6
    errors = error(ours, exact), error(theirs, exact)
    met = errors[0] <= max(2 * errors[1], floor)
    return {'what': what, 'ours': f'{errors[0]:.1e}', name: f'{errors[1]:.1e}', 'met': met}


def time_row(what: str, times: dict[str, list[float]], floor: float | None = None) -> dict:
    """Our median time, and the others' times divided by ours: median, lowest and highest round.

    Args:
        floor: least possible seconds, if known.
    """
    median = statistics.median(times['ours'])
    row: dict = dict(what=what)
    if floor is not None:
        row['floor'] = f'{floor * 1e3:.4g} ms ({floor / median:.0%})'
    row['ours'] = f'{median * 1e3:.4g} ms'
    for name in times:
        if name != 'ours':
            ratios = [theirs / ours for theirs, ours in zip(times[name], times['ours'], strict=True)]
            row[name] = f'{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})'
    row['seconds'] = times
    return row


def memory_row(what: str, sizes: dict[str, int]) -> dict:
    """Our size, and its ratio to the others' sizes."""
    ratios = {name: sizes['ours'] / size for name, size in sizes.items() if name != 'ours'}
    return dict(
        what=what,
        ours=f'{sizes["ours"] / 2**20:.0f} MiB',
        **{name: f'{ratio:.2f} of {sizes[name] / 2**20:.0f} MiB' for name, ratio in ratios.items()},
        bytes=sizes,
    )


def print_table(rows: list[dict], title: str) -> None:
    """Print rows with a column per key, without the raw measurements."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ('seconds', 'bytes')))
    table = PrettyTable(columns, title=title, align='l')
    for row in rows:
        cells = {**row, 'met': 'yes' if row.get('met') else 'NO'}
        table.add_row([cells.get(column, '') for column in columns])
    print(table, flush=True)
