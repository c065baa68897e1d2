"""Predictions as tasks for Label Studio, whose brush masks are runs of RGBA values (https://labelstud.io/tags/brush)."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from .._files import whole
from ..errors import UserError
from ..models.confidence import CERTAIN
from .predictor import Picture, Predictor

CHANNELS = 4  # values per pixel, all equal: 0 or 255
SIZES = np.array([3, 4, 8, 16])  # bits for the length of a run
LONGEST = 2**16
RUNS = 2**16  # turned into bits at a time


class Tasks:
    """The tasks of the pictures of a run, written one by one to ``tasks.json`` in ``folder``.

    Args:
        pictures: the files that tasks may refer to. A task names its picture by the path from ``root``, the folder
            above the one that holds all pictures.
        model_version: name under which Label Studio shows the predictions.
    """

    def __init__(self, folder: Path, pictures: Sequence[str], predictor: Predictor, model_version: str):
        common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in pictures])
        self.root = os.path.dirname(common)
        self.path = folder / 'tasks.json'
        self.classes, self.palette, self.model_version = predictor.classes, predictor.palette, model_version
        self._file: IO[str]
        self._before = '[\n'

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let tasks be added; at the end the file is complete, on an error there is none."""
        with whole(self.path) as partial, partial.open('w') as self._file:
            yield
            self._file.write('\n]\n' if self._before == ',\n' else '[]\n')
        with whole(self.path.with_name('config.xml')) as partial:
            partial.write_text(_labeling_config(self.classes, self.palette))

    def add(self, task: str) -> None:
        """Append a task."""
        self._file.write(self._before + task)
        self._before = ',\n'

    def task(self, picture: Picture) -> str:
        """JSON of a task: a mask for each class in ``picture.label``, and the mean confidence as the score."""
        label = picture.label
        height, width = label.shape
        if CHANNELS * label.size >= 2**32:
            raise UserError(f'{picture.path} is {width} x {height}; Label Studio takes fewer than 2^30 pixels')
        present = np.flatnonzero(np.bincount(label.ravel(), minlength=len(self.classes))[: len(self.classes)])
        results = [
            dict(
                id=f'class{i}',
                type='brushlabels',
                from_name='labels',
                to_name='image',
                original_width=width,
                original_height=height,
                image_rotation=0,
                value=dict(format='rle', rle=list(brush_rle(label == i)), brushlabels=[self.classes[i]]),
            )
            for i in present
        ]
        reference = os.fsencode(os.path.relpath(picture.path, self.root))
        score = float(picture.confidence.mean() / CERTAIN)
        prediction = dict(model_version=self.model_version, score=round(score, 4), result=results)
        return json.dumps(dict(data=dict(image=f'/data/local-files/?d={quote(reference)}'), predictions=[prediction]))


def brush_rle(mask: np.ndarray) -> bytes:
    """Encode a mask, bool ``[H, W]``, as Label Studio stores the strokes of a brush.

    The format is that of https://www.npmjs.com/package/@thi.ng/rle-pack: number of values (32 bits), bits per value - 1
    (5), and four sizes - 1 (4 each); then for each run 1 (0 would announce different values), the index of a size (2),
    the number of values - 1 in so many bits, and the value.
    """
    flat = mask.ravel()
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    header = [(CHANNELS * flat.size, 32), (8 - 1, 5), *((size - 1, 4) for size in SIZES)]
    bits = np.array([value >> place & 1 for value, width in header for place in range(width)[::-1]], bool)
    encoded = bytearray()
    for first in range(0, len(bounds) - 1, RUNS):
        some = bounds[first : first + RUNS + 1]
        bits = np.concatenate([bits, _bits_of_runs(CHANNELS * np.diff(some), flat[some[:-1]])])
        whole_bytes = len(bits) // 8 * 8
        encoded += np.packbits(bits[:whole_bytes]).tobytes()
        bits = bits[whole_bytes:]
    return bytes(encoded) + np.packbits(bits).tobytes()


def _bits_of_runs(lengths: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Bits of runs of 0 or 255; longer ones than a size can hold become several."""
    pieces = -(-lengths // LONGEST)
    sizes = np.full(pieces.sum(), LONGEST)
    sizes[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * LONGEST
    kinds = np.searchsorted(2**SIZES, sizes)
    words = ((4 | kinds) << SIZES[kinds] | sizes - 1) << 8 | np.where(np.repeat(values, pieces), 255, 0)
    places = (SIZES[kinds] + 10)[:, None] - np.arange(SIZES.max() + 11)  # from each word's highest bit down
    return (words[:, None] >> places.clip(min=0) & 1).astype(bool)[places >= 0]


def _labeling_config(classes: Sequence[str], palette: Any) -> str:
    """The labelling interface of a project that fits the tasks."""
    lines = [
        f'    <Label value={quoteattr(name)} background="#{bytes(colour).hex()}"/>'
        for name, colour in zip(classes, palette, strict=True)
    ]
    return '\n'.join(
        [
            '<View>',
            '  <Image name="image" value="$image"/>',
            '  <BrushLabels name="labels" toName="image">',
            *lines,
            '  </BrushLabels>',
            '</View>\n',
        ]
    )
