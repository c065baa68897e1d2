"""COCO's instances: https://cocodataset.org/#format-data."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..._extras import require
from ...errors import UserError
from .base import RegionAnnotations, Sample, Size
from .drawing import Bitmap, Region
from .words import place_of, split_in_name


class CocoAnnotations(RegionAnnotations):
    """Polygons and run lengths of COCO's instances; larger regions are drawn first, so that smaller ones stay visible.

    A split is taken from the name of the file (``instances_val2017.json``) or its folder (``valid/``).
    """

    kind = 'COCO annotations'
    form = 'region'

    @staticmethod
    def recognises(document: Any) -> bool:
        """Whether it is a dict of images, annotations and categories."""
        return isinstance(document, dict) and {'images', 'annotations', 'categories'} <= document.keys()

    def add(self, file: str, document: dict) -> None:
        """Add the pictures of one file."""
        images, annotations, categories = (
            _dicts(self, file, document, key) for key in ('images', 'annotations', 'categories')
        )
        if any('segments_info' in annotation for annotation in annotations):
            raise self.wrong(file, 'it has panoptic segments; export instances instead')
        labels = {_number(category, 'id'): self.label(file, category.get('name')) for category in categories}
        if len(set(labels.values())) < len(categories):
            raise self.wrong(file, 'two categories share a name or an id')
        self.lists[file] = list(labels.values())
        regions: dict[Any, list[tuple[float, Region]]] = {_number(image, 'id'): [] for image in images}
        sizes = {_number(image, 'id'): self.size(file, image.get('width'), image.get('height')) for image in images}
        if len(regions) < len(images):
            raise self.wrong(file, 'two images share an id')
        for annotation in annotations:
            image, category = _number(annotation, 'image_id'), _number(annotation, 'category_id')
            if image not in regions:
                raise self.wrong(file, f'an annotation belongs to the image {image!r}, which is not listed')
            if category not in labels:
                raise self.wrong(file, f'an annotation has the category {category!r}, which is not listed')
            region = self._region(file, labels[category], annotation.get('segmentation'), sizes[image])
            if region is None:
                self.skipped['boxes without a segmentation'] += 1
            else:
                regions[image].append(region)
        folder = place_of(file.split('/')[:-1]).split
        split = split_in_name(file.rpartition('/')[2]) or folder
        for image in images:
            name = image.get('file_name')
            if not isinstance(name, str):
                raise self.wrong(file, f'an image has no file_name: {image!r:.60}')
            found = self.picture(name, file, split)
            if found:
                drawn = sorted(regions[_number(image, 'id')], key=lambda pair: -pair[0])
                content = [region for _, region in drawn]
                own = split or place_of(found.split('/')[:-1]).split
                self.samples.append(Sample(found, own, file, content, sizes[_number(image, 'id')]))

    def _region(self, file: str, label: str, segmentation: Any, size: Size) -> tuple[float, Region] | None:
        """Area and region, or None for an annotation without one."""
        if isinstance(segmentation, dict):
            foreground = check_run_lengths(segmentation, size)
            if isinstance(foreground, str):
                raise self.wrong(file, foreground)
            return foreground, Region(label, bitmap=partial(decode_run_lengths, segmentation, size))
        if not segmentation:
            return None
        if not isinstance(segmentation, list):
            raise self.wrong(file, f'a segmentation must be polygons or run lengths, got {segmentation!r:.60}')
        region = Region(label, [self.corners(file, ring) for ring in segmentation])
        return region.reach(), region


def _dicts(annotations: RegionAnnotations, file: str, document: Mapping, key: str) -> list[dict]:
    value = document[key]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise annotations.wrong(file, f'{key} must be a list of objects')
    return value


def _number(item: dict, key: str) -> Any:
    """An id, if it can be one."""
    value = item.get(key)
    return value if isinstance(value, int | str) else None


def check_run_lengths(runs: Mapping, size: Size) -> float | str:
    """Number of pixels in the foreground, or what is wrong: pycocotools leaves pixels undefined if runs are missing."""
    if runs.get('size') != [size[1], size[0]]:
        return f'run lengths are for {runs.get("size")!r:.40} (height, width), but the image has {[size[1], size[0]]}'
    counts = runs.get('counts')
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        return f'run lengths must be numbers from 0, or their compressed form, got {counts!r:.60}'
    if sum(counts) != size[0] * size[1]:
        return f'run lengths cover {sum(counts)} pixels, but the image has {size[0] * size[1]}'
    return float(sum(counts[1::2]))


def _decompressed(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed form: base 32, from the third on as differences from the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts if shift == 0 else None


def decode_run_lengths(runs: Mapping, size: Size) -> Bitmap:
    """Decode run lengths with pycocotools."""
    coco = require('pycocotools.mask', 'datasets', 'decoding run lengths')
    if isinstance(runs['counts'], list):
        runs = coco.frPyObjects(runs, size[1], size[0])
    mask = coco.decode(runs)
    if mask.shape != size[::-1]:
        raise UserError(f'run lengths of another size: {mask.shape}')
    return mask.astype(bool), 0, 0
