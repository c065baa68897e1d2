"""CVAT for images 1.1: https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import require
from ...checkpoints.wording import first_sentence
from ...errors import UserError
from .base import RegionAnnotations, Sample, Size, check_length
from .drawing import Bitmap, Region, box, ellipse, turned
from .words import SPLIT_NAMES, place_of

SKIPPED = {'points': 'points', 'polyline': 'polylines', 'cuboid': 'cuboids', 'skeleton': 'skeletons'}


class CvatAnnotations(RegionAnnotations):
    """CVAT's polygons, masks, boxes and ellipses, drawn by their z_order. Points and lines are left out.

    A split is the subset of the picture.
    """

    kind = 'CVAT annotations'
    form = 'region'
    suffix = '.xml'

    @staticmethod
    def recognises(document: Any) -> bool:
        """Whether the root of an XML file is ``annotations``."""
        return document == 'annotations'

    def add(self, file: str, document: Any = None) -> None:
        """Add the pictures of one file, which is read image by image."""
        self.lists[file] = []
        for element in elements(self.tree.path(file), {'label', 'image', 'track'}):
            if element.tag == 'label':
                self._label(file, element)
            elif element.tag == 'track':
                raise self.wrong(file, "it has the tracks of a video; export 'CVAT for images 1.1'")
            else:
                self._image(file, element)
        if not self.lists[file]:
            del self.lists[file]  # exports without meta data list no classes

    def _label(self, file: str, element: Any) -> None:
        name = self.label(file, element.findtext('name'))
        if element.findtext('type') == 'skeleton' or element.findtext('parent'):
            return  # and the points of a skeleton
        if name not in self.lists[file]:
            self.lists[file].append(name)
        colour = element.findtext('color') or ''
        if len(colour) == 7 and colour[0] == '#':
            try:
                self.colours[name] = list(bytes.fromhex(colour[1:]))
            except ValueError:
                raise self.wrong(file, f'a colour must be #RRGGBB, got {colour!r}') from None

    def _image(self, file: str, element: Any) -> None:
        size = self.size(file, element.get('width'), element.get('height'))
        regions = []
        for shape in element:
            order = self._numbers(file, shape.get('z_order') or '0')[0]
            if shape.tag in SKIPPED:
                self.skipped[SKIPPED[shape.tag]] += 1
            elif shape.tag != 'tag':
                regions.append((order, self._region(file, shape, size)))
        subset = (element.get('subset') or '').lower()
        split = SPLIT_NAMES.get(subset)
        image = self.picture(element.get('name') or '', file, split)
        if image:
            content = [region for _, region in sorted(regions, key=lambda pair: pair[0])]
            self.samples.append(Sample(image, split or place_of(image.split('/')[:-1]).split, file, content, size))

    def _region(self, file: str, shape: Any, size: Size) -> Region:
        label = self.label(file, shape.get('label'))
        if shape.tag == 'polygon':
            return Region(label, [self.corners(file, self._numbers(file, shape.get('points')))])
        if shape.tag == 'mask':
            return Region(label, bitmap=partial(self._bitmap, file, dict(shape.items()), size))
        rotation = self._numbers(file, shape.get('rotation') or '0')[0]
        if shape.tag == 'box':
            left, top, right, bottom = (self._numbers(file, shape.get(key))[0] for key in ('xtl', 'ytl', 'xbr', 'ybr'))
            corners, centre = box(left, top, right, bottom), ((left + right) / 2, (top + bottom) / 2)
        elif shape.tag == 'ellipse':
            x, y, rx, ry = (self._numbers(file, shape.get(key))[0] for key in ('cx', 'cy', 'rx', 'ry'))
            corners, centre = ellipse(x, y, rx, ry), (x, y)
        else:
            raise self.wrong(file, f'unknown shape {shape.tag!r:.40}')
        return Region(label, [self.corners(file, turned(corners, centre, rotation))])

    def _bitmap(self, file: str, shape: dict[str, str], size: Size) -> Bitmap:
        """Decode run lengths, row by row from the background on, in a rectangle."""
        left, top, width, height = (int(self._numbers(file, shape.get(key))[0]) for key in BOX)
        if not (0 <= left <= left + width <= size[0] and 0 <= top <= top + height <= size[1]):
            raise self.wrong(file, f'a mask reaches outside its picture of {size[0]} x {size[1]}')
        runs = np.array(self._numbers(file, shape.get('rle'))).astype(np.int64)
        if (runs < 0).any() or runs.sum() != width * height:
            raise self.wrong(file, f'the run lengths of a mask cover {runs.sum()} pixels, not {width * height}')
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width), left, top

    def _numbers(self, file: str, text: str | None) -> list[float]:
        try:
            numbers = [float(number) for number in (text or '').replace(';', ',').split(',')]
        except ValueError:
            raise self.wrong(file, f'numbers are needed, got {text!r:.60}') from None
        if not all(abs(number) < 1e9 for number in numbers):
            raise self.wrong(file, f'finite numbers are needed, got {text!r:.60}')
        return numbers


BOX = ('left', 'top', 'width', 'height')


def root_tag(path: Path) -> str:
    """Name of the root of an XML file; raises ``UserError`` if the file is damaged or declares entities."""
    return next(iter(elements(path, None)), None) or ''


def elements(path: Path, tags: set[str] | None) -> Iterator[Any]:
    """The elements with one of ``tags`` of an XML file, one after the other, or the name of its root.

    Raises:
        UserError: the file is damaged, huge, or declares entities, which could expand to any size.
    """
    xml = require('defusedxml.ElementTree', 'datasets', "reading CVAT's XML")
    check_length(path)
    try:
        root = None
        for event, element in xml.iterparse(path, events=('start', 'end'), forbid_dtd=True):
            if root is None:
                root = element
                if tags is None:
                    yield root.tag
                    return
            if event == 'end' and tags and element.tag in tags:
                yield element
                root.clear()  # what has been read
    except UserError:
        raise
    except Exception as error:  # the parser's and defusedxml's own kinds
        if type(error).__name__ == 'DTDForbidden':
            raise UserError(
                f'{path} has a document type, which annotations do not need and which could do harm'
            ) from None
        raise UserError(f'{path} is no readable XML ({first_sentence(error)})') from None
