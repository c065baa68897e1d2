"""Label Studio's JSON export: https://labelstud.io/guide/export#json."""

import re
from functools import partial
from typing import Any

import numpy as np

from .base import RegionAnnotations, Sample, Size
from .drawing import Bitmap, Region, box, ellipse, turned
from .words import place_of

LABELS = ('polygonlabels', 'brushlabels', 'rectanglelabels', 'ellipselabels', 'labels')
_UPLOADED = re.compile(r'^[0-9a-f]{8}-')  # what Label Studio puts before the name of an uploaded file


class LabelStudioAnnotations(RegionAnnotations):
    """Label Studio's polygons, brush strokes, rectangles and ellipses, drawn in their order.

    Of several annotations of one picture, the newest is taken, but none that was skipped or is a prediction.
    """

    kind = 'Label Studio annotations'
    form = 'region'

    @staticmethod
    def recognises(document: Any) -> bool:
        """Whether it is a list of tasks with data and annotations."""
        return bool(document) and isinstance(document, list) and all(_is_task(task) for task in document)

    def add(self, file: str, document: list) -> None:
        """Add the pictures of one export."""
        for task in document:
            done = [
                entry for entry in task['annotations'] if isinstance(entry, dict) and not entry.get('was_cancelled')
            ]
            if not done:
                self.skipped['tasks that nobody has annotated'] += 1
                continue
            if len(done) > 1:
                self.skipped['older annotations of pictures that have several'] += len(done) - 1
            results = max(done, key=lambda entry: str(entry.get('updated_at') or '')).get('result')
            if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
                raise self.wrong(file, 'result must be a list of objects')
            self._add_task(file, task['data'], results)

    def _add_task(self, file: str, data: dict, results: list[dict]) -> None:
        names = [value for value in data.values() if isinstance(value, str)]
        used = [str(name) for value in names for name in (value.rpartition('d=')[2], value.partition('?')[0])]
        used += [_UPLOADED.sub('', name.rpartition('/')[2]) for name in used]
        image = next((found for name in used if (found := self.tree.find(name, file, None))), None)
        if image is None:
            self.lost.append(names[0] if names else 'a task without data')
            return
        sizes = {
            self.size(file, result.get('original_width'), result.get('original_height'))
            for result in results
            if 'original_width' in result
        }
        if len(sizes) > 1:
            raise self.wrong(file, f'the regions of {image} are for pictures of several sizes')
        size = sizes.pop() if sizes else None
        regions = [region for result in results if size and (region := self._region(file, result, size))]
        self.samples.append(Sample(image, place_of(image.split('/')[:-1]).split, file, regions, size))

    def _region(self, file: str, result: dict, size: Size) -> Region | None:
        value = result.get('value')
        if not isinstance(value, dict):
            raise self.wrong(file, f'a result has no value: {result!r:.60}')
        labels = next((value[key] for key in LABELS if key in value), None)
        if labels is None:
            return None  # a choice, a text, or a region to which another result gives the label
        if not isinstance(labels, list) or len(labels) != 1:
            raise self.wrong(file, f'a region must have one label, got {labels!r:.60}')
        if result.get('image_rotation'):
            raise self.wrong(file, 'a picture was rotated in Label Studio; its regions do not fit the file')
        label = self.label(file, labels[0])
        if 'rle' in value:
            return Region(label, bitmap=partial(self._brush, file, value['rle'], size))
        if 'points' in value:
            return Region(label, [self.corners(file, value['points']) / 100 * size])
        if {'x', 'y'} <= value.keys() and ({'width', 'height'} <= value.keys() or 'radiusX' in value):
            return Region(label, [self._shape(file, value, size)])
        self.skipped['results that enclose no region'] += 1
        return None

    def _shape(self, file: str, value: dict, size: Size) -> np.ndarray:
        """Corners in pixels of a rectangle, turned around its first corner, or an ellipse, around its centre."""
        keys = ('radiusX', 'radiusY') if 'radiusX' in value else ('width', 'height')
        given = [[value['x'], value['y']], [value.get(key) for key in keys]]
        (x, y), (a, b) = self.corners(file, given, least=2) / 100 * size
        ((rotation, _),) = self.corners(file, [[value.get('rotation') or 0, 0]], least=1)
        corners = ellipse(x, y, a, b) if 'radiusX' in value else box(x, y, x + a, y + b)
        return turned(corners, (x, y), rotation)

    def _brush(self, file: str, runs: Any, size: Size) -> Bitmap:
        if not isinstance(runs, list):
            raise self.wrong(file, f'a brush stroke must be a list of bytes, got {runs!r:.60}')
        try:
            values = decode_brush(bytes(runs), 4 * size[0] * size[1])
        except (TypeError, ValueError) as error:
            raise self.wrong(file, f'a brush stroke cannot be decoded ({error})') from None
        return values.reshape(size[1], size[0], 4)[..., 3] > 0, 0, 0


def _is_task(task: Any) -> bool:
    return isinstance(task, dict) and isinstance(task.get('data'), dict) and isinstance(task.get('annotations'), list)


def decode_brush(data: bytes, count: int) -> np.ndarray:
    """Decode the run lengths of Label Studio's brush: ``count`` bytes, the RGBA pixels row by row.

    The format is rle-pack's (https://github.com/thi-ng/umbrella): a header with the number of values, the bits of a
    value and four widths of run lengths; then per run a bit (repeated or different values), the index of a width, the
    length less one, and one value or all of them.

    Raises:
        ValueError: the data end early, or are for another number of values.
    """
    bits = _Bits(data)
    number, width = bits.read(32), bits.read(5) + 1
    widths = [bits.read(4) + 1 for _ in range(4)]
    if number != count or width > 8:
        raise ValueError(f'it has {number} values of {width} bits, but its picture {count} of 8')
    values = np.zeros(count, np.uint8)
    at = 0
    while at < count:
        repeated = bits.read(1)
        end = at + 1 + bits.read(widths[bits.read(2)])
        if end > count:
            raise ValueError('a run is too long')
        values[at:end] = bits.read(width) if repeated else [bits.read(width) for _ in range(end - at)]
        at = end
    return values


class _Bits:
    """Numbers of any width from bytes, most significant bit first."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def read(self, width: int) -> int:
        end = self.at + width
        if end > 8 * len(self.data):
            raise ValueError('it ends early')
        word = int.from_bytes(self.data[self.at // 8 : -(-end // 8)], 'big') >> -end % 8
        self.at = end
        return word & ((1 << width) - 1)
