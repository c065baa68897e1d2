"""Checks of rasters and of labels in TIFF files, in memory that does not grow with their size."""

import hashlib
from dataclasses import dataclass

import numpy as np

from ..rasters import Raster
from .raster_loading import LabelRaster, LoadRasterFromFile

SAME_PLACE = 1e-3  # pixels by which the corners of a label may lie elsewhere


@dataclass
class BandStatistics:
    """Mean and variance of each band, updated without a loss of digits (Chan, Golub and LeVeque, 1979).

    Args:
        count: number of pixels.
        mean: float64 ``[bands]``.
        squares: sums of squared differences from the mean, float64 ``[bands]``.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> 'BandStatistics':
        """Statistics of ``[bands, pixels]``."""
        values = values.astype(np.float64)
        mean = values.mean(1)
        return cls(values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(1))

    def add(self, other: 'BandStatistics') -> None:
        """Include further pixels."""
        count = self.count + other.count
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / count)
        self.squares = self.squares + other.squares + difference**2 * (self.count * other.count / count)
        self.count = count

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of each band."""
        return np.sqrt(self.squares / self.count)

    def __str__(self) -> str:
        """Two lines for a config."""
        named = ('mean', self.mean), ('std', self.deviation)
        return '\n'.join(f'    {name}=[{", ".join(f"{value:.6g}" for value in values)}],' for name, values in named)


def read_through(path: str, loader: LoadRasterFromFile) -> tuple[tuple[int, int], bytes, BandStatistics | None]:
    """Read a raster completely: (width, height), a digest of its values, and the statistics of its pixels, if any.

    Raises:
        RasterError: it cannot be read.
    """
    digest, total = hashlib.blake2b(), None
    with Raster(path, loader.bands, fill=loader.fill) as raster:
        for place in raster.parts():
            values, void = raster.read(*place)
            digest.update(np.ascontiguousarray(values))
            known = values.reshape(len(values), -1) if void is None else values[:, ~void]
            if known.size:
                part = BandStatistics.of(known)
                if total is None:
                    total = part
                else:
                    total.add(part)
        return (raster.width, raster.height), digest.digest(), total


def count_bands(path: str, loader: LoadRasterFromFile) -> int:
    """Number of bands that the loader reads from a file; raises ``RasterError`` if it cannot be read."""
    with Raster(path, loader.bands) as raster:
        return len(raster.bands)


def count_ids(info: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels per id of a label, int64 ``[256]``, and its (width, height); raises ``RasterError``.

    Args:
        info: what a data set says about an image.
    """
    pixels = np.zeros(256, np.int64)
    with LabelRaster(info['seg_map_path'], info) as labels:
        for place in labels.parts():
            pixels += np.bincount(labels.read_ids(*place).ravel(), minlength=256)
        return pixels, (labels.width, labels.height)


def lies_elsewhere(info: dict) -> bool:
    """Whether label and raster both have a georeference, and their corners differ."""
    with Raster(info['img_path']) as raster, Raster(info['seg_map_path']) as label:
        transforms = [source.georeference['transform'] for source in (raster, label)]
        if any(transform.is_identity for transform in transforms):
            return False
        there, here = (np.reshape(tuple(transform), (3, 3)) for transform in transforms)
        apart = (there - here) @ [[0, raster.width], [0, raster.height], [1, 1]]
        return bool(np.abs(apart).max() > SAME_PLACE * np.abs(there[0, :2]).sum())
