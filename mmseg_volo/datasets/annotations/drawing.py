"""Labelled regions of a picture, and label maps drawn from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..._extras import require

UNCOVERED = ''  # the label of pixels in no region
Bitmap = tuple[np.ndarray, int, int]  # bool [h, w], and the column and row of its first pixel


@dataclass(frozen=True)
class Region:
    """A labelled region: the union of polygons, or a bitmap.

    Args:
        label: name of its class.
        rings: polygons, each float ``[corners, 2]``, x and y in pixels, where the first pixel reaches from 0 to 1.
        bitmap: decodes the bitmap, if it is none of polygons.
    """

    label: str
    rings: Sequence[np.ndarray] = ()
    bitmap: Callable[[], Bitmap] | None = None

    def reach(self) -> float:
        """The largest area of its polygons, in pixels."""
        return max((area(ring) for ring in self.rings), default=0)


def draw(regions: Sequence[Region], size: tuple[int, int], ids: Mapping[str, int]) -> np.ndarray:
    """Draw regions one over the other: int32 ``[H, W]`` with ``ids[label]``, and ``ids[UNCOVERED]`` elsewhere.

    Args:
        size: width and height.
    """
    canvas = np.full(size[::-1], ids[UNCOVERED], np.int32)
    for region in regions:
        if region.bitmap is not None:
            _paste(canvas, region.bitmap(), ids[region.label])
        else:
            _fill(canvas, region.rings, ids[region.label])
    return canvas


def _fill(canvas: np.ndarray, rings: Sequence[np.ndarray], value: int) -> None:
    """Fill polygons with pycocotools, which decides at the centres of pixels, inside their bounding box."""
    coco = require('pycocotools.mask', 'datasets', 'drawing polygons')
    rings = [ring for ring in (clip(ring, canvas.shape[1], canvas.shape[0]) for ring in rings) if len(ring) > 2]
    if not rings:
        return
    corners = np.concatenate(rings)
    left, top = np.floor(corners.min(axis=0)).astype(int)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int)
    if right > left and bottom > top:
        flat = [(ring - (left, top)).ravel().tolist() for ring in rings]
        mask = coco.decode(coco.merge(coco.frPyObjects(flat, bottom - top, right - left)))
        canvas[top:bottom, left:right][mask > 0] = value


def _paste(canvas: np.ndarray, bitmap: Bitmap, value: int) -> None:
    mask, left, top = bitmap
    part = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    part[mask[: part.shape[0], : part.shape[1]]] = value


def clip(ring: np.ndarray, width: int, height: int) -> np.ndarray:
    """The part of a polygon ``[corners, 2]`` inside a picture (Sutherland and Hodgman, 1974); it may have no corners.

    pycocotools crashes on far corners.
    """
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        beyond = sign * (ring[:, axis] - limit)  # negative outside
        if (beyond >= 0).all():
            continue
        kept = []
        for i, (corner, side) in enumerate(zip(ring, beyond, strict=True)):
            before, side_before = ring[i - 1], beyond[i - 1]
            if (side >= 0) != (side_before >= 0):
                crossing = before + (corner - before) * (side_before / (side_before - side))
                crossing[axis] = limit
                kept.append(crossing)
            if side >= 0:
                kept.append(corner)
        ring = np.array(kept).reshape(-1, 2)
    return ring


def area(ring: np.ndarray) -> float:
    """Area of a polygon ``[corners, 2]`` by the shoelace formula."""
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def turned(corners: np.ndarray, centre: tuple[float, float], degrees: float) -> np.ndarray:
    """Corners ``[corners, 2]`` rotated clockwise around ``centre``."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (corners - centre) @ turn + centre


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Corners of a rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    """Corners of a polygon of 72 sides in an ellipse."""
    angle = np.arange(72) * (2 * np.pi / 72)
    return np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1)
