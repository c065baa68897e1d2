"""Plot the training curves of one or more runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .._extras import require
from .._files import whole
from ..config import output_path
from ..errors import UserError

CURVES = dict(loss='loss', lr='learning rate', mIoU='validation mIoU, %')

Curve = dict[int, float]  # a value per iteration


def plot(work_dirs: Sequence[str], out: str = 'plot.png') -> None:
    """Plot loss, learning rate and mIoU of the newest run in each work dir, including the runs it resumed.

    Raises:
        UserError: a work dir has no logged values, ``out`` is not writable, or matplotlib is missing.
    """
    require('matplotlib', 'report', 'plot')
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    picture = output_path(out)
    work_dirs = list(dict.fromkeys(work_dirs))
    runs = dict(zip(_names(work_dirs), map(_curves, map(Path, work_dirs)), strict=True))
    drawn = [key for key in CURVES if any(curves[key] for curves in runs.values())]
    figure = Figure((8, 2.5 * len(drawn)), layout='constrained')
    for axes, key in zip(figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0], drawn, strict=True):
        for name, curves in runs.items():
            steps = sorted(curves[key])
            values = [curves[key][step] for step in steps]
            axes.plot(steps, values, 'o-' if key == 'mIoU' else '-', label=name, markersize=4)
        axes.set_ylabel(CURVES[key])
        axes.grid(alpha=0.3)
    axes.set_xlabel('iteration')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.axes[0].legend()
    with whole(picture) as partial:
        figure.savefig(partial, format='png', dpi=150)
    print(f'{out}: {", ".join(drawn)} for {", ".join(work_dirs)}')


def _curves(work_dir: Path) -> dict[str, Curve]:
    """Curves of the newest run; before its first iteration, those of the runs it resumed."""
    if not work_dir.is_dir():
        raise UserError(f'no folder {work_dir}; expected the work dir of a training run')
    curves: dict[str, Curve] = {key: {} for key in CURVES}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):  # named by start time
        records = _records(path)
        for key, earlier in curves.items():
            run = {record['step']: record[key] for record in records if key in record}
            start = min(run, default=float('inf')) if _resumed(path) else 0
            curves[key] = {step: value for step, value in earlier.items() if step < start} | run
    if not any(curves.values()):
        raise UserError(f'{work_dir} has no logged values yet: {work_dir}/*/vis_data/scalars.json is missing or empty')
    return curves


def _records(path: Path) -> list[dict]:
    try:
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith('\n'):  # still being written
            del lines[-1]
        records = [json.loads(line) for line in lines]
        for record in records:
            for value in (record['step'], *(record[key] for key in CURVES if key in record)):
                float(value)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error}); delete the broken line') from None
    return records


def _resumed(scalars: Path) -> bool:
    """Whether the run's config resumes. Its text is searched, because loading a config would execute it."""
    config = scalars.with_name('config.py')
    return config.is_file() and bool(re.search(r'^resume = True$', config.read_text(), re.MULTILINE))


def _names(work_dirs: Sequence[str]) -> list[str]:
    """Folder names, or full paths if names repeat."""
    names = [Path(work_dir).resolve().name for work_dir in work_dirs]
    return names if len(set(names)) == len(names) else list(work_dirs)
