"""Rows of the tables: errors, times as ratios, and memory."""

import statistics

import torch
from prettytable import PrettyTable
from torch import Tensor

FLOAT32 = 1e-6  # tolerance of float32


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest exact value; infinite if ``found`` is not finite."""
    if not torch.isfinite(found).all():  # max() would hide a NaN
        return float('inf')
    return ((found.double() - exact.double()).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def parity_row(
    what: str, ours: Tensor, theirs: Tensor, exact: Tensor, name: str = 'timm', float32: float = FLOAT32
) -> dict:
    """Parity allows at most twice the error of ``theirs``, or the tolerance of the dtype.

    Args:
        float32: that tolerance for float32.
    """
    return _parity_row(what, error(ours, exact), error(theirs, exact), ours.dtype, name, float32)


def gradients_row(
    what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], name: str = 'timm'
) -> dict:
    """Parity of all gradients, whose keys begin with ``'d '``: our largest error against the largest of theirs."""
    sizes = {key: value.abs().max() for key, value in exact.items() if key.startswith('d ')}
    # The exact gradient of a bias before a BatchNorm is zero, so it has no relative error.
    keys = [key for key, size in sizes.items() if size > 1e-9 * max(sizes.values())]
    errors = [{key: error(found[key], exact[key]) for key in keys} for found in (ours, theirs)]
    worst = max(errors[0], key=errors[0].__getitem__)
    return _parity_row(f'{what} {worst}', errors[0][worst], max(errors[1].values()), ours[worst].dtype, name, FLOAT32)


def _parity_row(what: str, ours: float, theirs: float, dtype: torch.dtype, name: str, float32: float) -> dict:
    floor = 4e-3 if dtype == torch.bfloat16 else float32
    return {'what': what, 'ours': f'{ours:.1e}', name: f'{theirs:.1e}', 'met': ours <= max(2 * theirs, floor)}


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
