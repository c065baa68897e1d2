"""Result files of a test: scores, pictures, report.html and the comparison with another run."""

import base64
import csv
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from mmengine.logging import MMLogger
from prettytable import PrettyTable

from .._extras import require
from .._files import whole
from ..errors import UserError
from .calibration import reliability
from .scores import Totals, areas, category_iou, class_scores, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE_SCORES = 'mIoU', 'aAcc', 'mBoundaryIoU'
PAGES = 'confusion.png', 'per_class.png', 'reliability.png', 'report.html'
NUMBERED = 20  # at most this many classes get numbers in the confusion matrix


@dataclass
class Run:
    """Results of another test, read from its files."""

    path: str
    record: dict
    draws: dict[str, np.ndarray]


@dataclass
class Difference:
    """A score of this run and another, with the 95 % interval of their difference."""

    name: str
    here: float | None
    there: float | None
    low: float | None
    high: float | None

    @property
    def gain(self) -> float | None:
        """Score of this run minus the other; None for a class without a score in one of them."""
        return None if self.low is None else self.here - self.there

    @property
    def verdict(self) -> str:
        """Whether this run is better or worse: significant if the interval excludes 0."""
        if self.low is None:
            return ''
        return 'better' if self.low > 0 else 'worse' if self.high < 0 else 'not significant'


def summary(totals: Totals, classes: Sequence[str]) -> dict:
    """All scores in percent with their intervals; None where a score is undefined."""
    pixels = areas(totals.confusion)
    draws = totals.bootstrap_scores()
    bounds = interval(draws['IoU'])
    per_class = class_scores(pixels, totals.edges)
    categories = category_iou(totals.confusion, classes)
    return dict(
        metrics=_numbers(totals.mean_scores()),
        intervals={name: [_number(bound) for bound in interval(draws[name])] for name in ('mIoU', 'aAcc')},
        images=totals.images,
        classes=[
            dict(
                name=name,
                pixels=int(pixels[1, i]),
                **_numbers({key: values[i] for key, values in per_class.items()}),
                IoU_interval=[_number(bound) for bound in bounds[:, i]],
            )
            for i, name in enumerate(classes)
        ],
        **(dict(categories=_numbers(categories)) if categories else {}),
        **(dict(reliability=reliability(totals.calibration)) if totals.calibration.any() else {}),
    )


def write_results(
    folder: Path,
    record: dict,
    totals: Totals,
    palette: Sequence,
    other: Run | None = None,
    damaged: Sequence[bytes] = (),
) -> Path:
    """Write the scores into ``folder``, then the pictures and ``report.html`` if their packages are installed.

    Args:
        folder: already holds ``per_image.csv``.
        record: content of ``metrics.json``: the ``summary`` and the circumstances of the test.
        palette: a colour per class.
        other: run to compare with this one.
        damaged: a picture of each row of the record's ``corruptions``.

    Returns:
        Path of ``report.html``, or of ``metrics.json`` if jinja2 or matplotlib is missing.
    """
    draws = _draws(totals)
    archive = io.BytesIO()
    np.savez_compressed(archive, **draws)
    write_whole(folder / 'bootstrap.npz', archive.getvalue())
    write_whole(folder / 'metrics.json', json.dumps(record, indent=2, allow_nan=False).encode() + b'\n')
    try:
        jinja2 = require('jinja2', 'report', 'report.html')
        require('matplotlib', 'report', 'report.html')
    except UserError as missing:
        for name in PAGES:  # from an earlier test
            (folder / name).unlink(missing_ok=True)
        MMLogger.get_current_instance().warning(f'{missing}; the scores are in {folder / "metrics.json"}')
        return folder / 'metrics.json'
    confusion = _confusion_picture(totals.confusion, [row['name'] for row in record['classes']])
    write_whole(folder / 'confusion.png', confusion)
    write_whole(folder / 'per_class.png', _class_picture(record['classes']))
    diagram = None
    (folder / 'reliability.png').unlink(missing_ok=True)
    if 'reliability' in record:
        diagram = _reliability_picture(record['reliability'])
        write_whole(folder / 'reliability.png', diagram)

    pages = jinja2.Environment(
        loader=jinja2.PackageLoader('mmseg_volo', 'evaluation'),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters.update(score=_written, bounds=_written_bounds, inline=_inline, stem=lambda path: Path(path).stem)
    html = pages.get_template('report.html.j2').render(
        record=record,
        palette=palette,
        confusion=confusion,
        diagram=diagram,
        damaged=damaged,
        differences=_differences(record, draws, other) if other else [],
        other=other,
        examples=dict(Worst=totals.worst, Best=totals.best),
        image_scores=IMAGE_SCORES,
        images=_image_rows(folder / 'per_image.csv'),
    )
    write_whole(folder / 'report.html', html.encode())
    return folder / 'report.html'


def read_run(path: str, classes: Sequence[str], images_sha256: str) -> Run:
    """Read ``metrics.json`` at ``path`` and ``bootstrap.npz`` beside it, for a comparison with this run.

    Raises:
        UserError: the files are damaged or missing, or their classes or images differ from those of this run.
    """
    try:
        record = json.loads(Path(path).read_text())
        with np.load(Path(path).with_name('bootstrap.npz')) as archive:
            run = Run(path, record, dict(archive))
        theirs, their_images = [row['name'] for row in record['classes']], record['images_sha256']
        _differences(record, run.draws, run)  # with itself: raises if anything is missing
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(
            f'--compare {path} needs a metrics.json written by mmseg-volo test, with its bootstrap.npz beside it '
            f'({type(error).__name__}: {error}); test that checkpoint again'
        ) from None
    if theirs != list(classes):
        odd = sorted(set(theirs) ^ set(classes))
        which = f'only one has {", ".join(odd[:5])}' if odd else 'their order differs'
        raise UserError(f'--compare {path} has {len(theirs)} classes, this run {len(classes)}: {which}')
    if their_images != images_sha256:
        raise UserError(f'--compare {path} was tested on other images; test both checkpoints on the same images')
    return run


def comparison_table(record: dict, totals: Totals, other: Run) -> PrettyTable:
    """Scores of this run beside those of another, with the 95 % interval of each difference."""
    table = PrettyTable(['score', 'this run', 'other run', 'difference', '95 % interval', 'this run is'], align='r')
    table.align['score'] = 'l'
    for row in _differences(record, _draws(totals), other):
        bounds = _written_bounds((row.low, row.high))
        table.add_row([row.name, _written(row.here), _written(row.there), _written(row.gain), bounds, row.verdict])
    return table


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole(path) as partial:
        partial.write_bytes(content)


def _differences(record: dict, draws: dict[str, np.ndarray], other: Run) -> list[Difference]:
    """Means first, then classes. Replicates are paired: each has the same images in both runs."""
    rows = [
        (name, record['metrics'][name], other.record['metrics'][name], draws[name] - other.draws[name])
        for name in ('mIoU', 'aAcc')
    ] + [
        (here['name'], here['IoU'], there['IoU'], draws['IoU'][:, i] - other.draws['IoU'][:, i])
        for i, (here, there) in enumerate(zip(record['classes'], other.record['classes'], strict=True))
    ]
    return [Difference(*row, *map(_number, interval(pairs))) for *row, pairs in rows]


def _draws(totals: Totals) -> dict[str, np.ndarray]:
    """Scores of the bootstrap replicates as they are stored."""
    return {name: values.astype(np.float32) for name, values in totals.bootstrap_scores().items()}


def _image_rows(path: Path) -> list[tuple[str, list[float | None]]]:
    with path.open(newline='') as file:
        return [
            (row['image'], [float(row[key]) if row[key] else None for key in IMAGE_SCORES])
            for row in csv.DictReader(file)
        ]


def _confusion_picture(confusion: np.ndarray, classes: Sequence[str]) -> bytes:
    """PNG of the confusion matrix: percent of each true class (row) predicted as each class (column)."""
    count = len(classes)
    rows = confusion.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.repeat(rows == 0, count, axis=1), 100 * confusion / np.maximum(rows, 1))
    side = 3 + 0.3 * count if count <= NUMBERED else 5 + 0.13 * count
    font = 8 if count <= NUMBERED else 5
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.set_facecolor('lightgrey')  # rows of classes without ground truth
    axes.imshow(shares, cmap='Blues', vmin=0, vmax=100)
    axes.set_xticks(range(count), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(count), classes, fontsize=font)
    axes.set_xlabel('prediction')
    axes.set_ylabel('ground truth')
    if count <= NUMBERED:
        for (y, x), share in np.ndenumerate(shares.filled(0)):
            if share >= 1:
                axes.text(x, y, f'{share:.0f}', ha='center', va='center', fontsize=6, color='w' if share > 60 else 'k')
    return _png(figure)


def _class_picture(rows: Sequence[dict]) -> bytes:
    """PNG of the IoU of each class with its interval."""
    known = [row for row in rows if row['IoU'] is not None]
    values = np.array([row['IoU'] for row in known])
    low, high = np.array([row['IoU_interval'] for row in known]).T
    figure = _figure(7, 1 + 0.22 * len(known))
    axes = figure.subplots()
    axes.barh([row['name'] for row in known], values, xerr=np.clip([values - low, high - values], 0, None), capsize=2)
    axes.tick_params(axis='y', labelsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 100)
    axes.set_xlabel('IoU in percent, with 95 % interval')
    return _png(figure)


def _reliability_picture(bins: Sequence[dict]) -> bytes:
    """PNG of the accuracy in each bin of confidence, with the distance to the mean confidence, and the bin's pixels."""
    known = [row for row in bins if row['pixels']]
    centres = [(row['low'] + row['high']) / 2 for row in known]
    accuracy, confidence, pixels = (
        np.array([row[key] for row in known]) for key in ('accuracy', 'confidence', 'pixels')
    )
    width = bins[0]['high'] - bins[0]['low']
    figure = _figure(5, 6)
    above, below = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    above.bar(centres, accuracy, width, edgecolor='white', label='accuracy')
    above.bar(
        centres,
        confidence - accuracy,
        width,
        bottom=accuracy,
        color='none',
        edgecolor='tab:red',
        hatch='//',
        label='distance to the mean confidence',
    )
    above.plot([0, 100], [0, 100], color='grey', linestyle='--', label='perfect calibration')
    above.set_xlim(0, 100)
    above.set_ylim(0, 100)
    above.set_ylabel('correct pixels in percent')
    above.legend(loc='upper left', fontsize=8)
    below.bar(centres, 100 * pixels / pixels.sum(), width, color='grey', edgecolor='white')
    below.set_ylim(0, 100)
    below.set_ylabel('pixels in percent')
    below.set_xlabel('confidence in percent')
    return _png(figure)


def _figure(width: float, height: float) -> 'Figure':
    return require('matplotlib.figure', 'report', 'report.html').Figure((width, height))


def _png(figure: 'Figure') -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', bbox_inches='tight', dpi=110)
    return buffer.getvalue()


def _inline(picture: bytes) -> str:
    kind = 'png' if picture.startswith(b'\x89PNG') else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(picture).decode()}'


def _written(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _written_bounds(bounds: Sequence[float | None]) -> str:
    low, high = bounds
    return _written(None) if low is None else f'{low:.2f} to {high:.2f}'


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _numbers(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
