"""Labelme's files, one per picture: https://github.com/wkentaro/labelme."""

import base64
import binascii
import io
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from .base import RegionAnnotations, Sample
from .drawing import Bitmap, Region, box, ellipse
from .words import place_of

SKIPPED = ('point', 'points', 'line', 'linestrip')


class LabelmeAnnotations(RegionAnnotations):
    """Labelme's shapes, drawn in their order. Points and lines enclose no region and are left out."""

    kind = 'Labelme polygons'
    form = 'polygon'

    @staticmethod
    def recognises(document: Any) -> bool:
        """Whether it is a dict with shapes and the path of a picture."""
        return isinstance(document, dict) and {'shapes', 'imagePath'} <= document.keys()

    def add(self, file: str, document: dict) -> None:
        """Add the picture of one file."""
        name, shapes = document['imagePath'], document['shapes']
        if not isinstance(name, str) or not isinstance(shapes, list):
            raise self.wrong(file, 'it needs imagePath and a list of shapes')
        split = place_of(file.split('/')[:-1]).split
        image = self.tree.find(name, file, split) or self.tree.beside(file)
        if image is None:
            self.lost.append(name)
            return
        size = None
        if document.get('imageWidth') and document.get('imageHeight'):
            size = self.size(file, document['imageWidth'], document['imageHeight'])
        regions = [region for shape in shapes if (region := self._region(file, shape))]
        self.samples.append(Sample(image, split or place_of(image.split('/')[:-1]).split, file, regions, size))

    def _region(self, file: str, shape: Any) -> Region | None:
        if not isinstance(shape, dict):
            raise self.wrong(file, f'a shape must be an object, got {shape!r:.60}')
        kind = shape.get('shape_type') or 'polygon'
        label = self.label(file, shape.get('label'))
        if kind in SKIPPED:
            self.skipped[f'{kind}s' if not kind.endswith('s') else kind] += 1
            return None
        if kind in ('polygon', 'oriented_rectangle'):
            return Region(label, [self.corners(file, shape.get('points'))])
        if kind not in ('rectangle', 'circle', 'mask'):
            raise self.wrong(file, f'unknown shape_type {kind!r:.40}')
        (x1, y1), (x2, y2) = self.corners(file, shape.get('points'), least=2)[:2]
        if kind == 'mask':
            size = round(x2) - round(x1) + 1, round(y2) - round(y1) + 1
            return Region(label, bitmap=partial(self._bitmap, file, shape.get('mask'), round(x1), round(y1), size))
        radius = np.hypot(x2 - x1, y2 - y1)
        rectangle = box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        return Region(label, [rectangle if kind == 'rectangle' else ellipse(x1, y1, radius, radius)])

    def _bitmap(self, file: str, text: Any, left: int, top: int, size: tuple[int, int]) -> Bitmap:
        """Decode the PNG file in a shape of the kind mask, which is given by its first and last pixel."""
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as picture:
                if picture.size != size:
                    raise self.wrong(file, f'a mask has {picture.size} pixels, but its corners give {size}')
                mask = np.asarray(picture.convert('1'))
        except (TypeError, binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise self.wrong(file, f'a mask cannot be decoded ({error})') from None
        if left < 0 or top < 0:
            raise self.wrong(file, 'a mask begins outside the picture')
        return mask, left, top
