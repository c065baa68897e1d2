"""Rasters: TIFF files of any size and with any number of bands, read in windows through rasterio."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import mmcv
import numpy as np
from PIL import TiffImagePlugin

from ._extras import require
from .errors import UserError

TIFF_SUFFIXES = ('.tif', '.tiff')
BIG_TIFF = (b'II+\0', b'MM\0+')  # first bytes
GEOREFERENCE = {33550, 33922, 34264, 34735, 50844}  # TIFF tags of the transform, the coordinate system and RPCs
NODATA, SAMPLES, BITS, WIDTH, HEIGHT = 42113, 277, 258, 256, 257  # TIFF tags
SMALL = 2**26  # pixels: above, a picture is read in windows
CACHE = 2**25  # bytes of decoded blocks that GDAL keeps; its default is a share of the machine's memory
LARGEST_BLOCK = 2**28  # bytes that GDAL decodes at a time
LARGEST = 2**40  # pixels
PART = 1024  # rows and columns of blocks to read at a time
STRETCH = 2, 98  # percentiles that a picture shows as black and white


class RasterError(UserError):
    """A file that cannot be read as a raster."""


def is_raster(path: str, deep: bool = False) -> bool:
    """Whether a file is better read in windows, and its georeference kept, than as an ordinary picture.

    True for a TIFF that is a BigTIFF, has a georeference or a value for missing pixels, neither one, three nor four
    samples per pixel, or more than ``SMALL`` pixels; with ``deep`` also if a sample has more than 8 bits. Needs no
    rasterio.
    """
    if not path.lower().endswith(TIFF_SUFFIXES):
        return False
    try:
        with open(path, 'rb') as file:
            header = file.read(8)
            if header[:4] in BIG_TIFF:
                return True
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
        if not GEOREFERENCE.isdisjoint(tags) or NODATA in tags or tags.get(SAMPLES, 1) not in (1, 3, 4):
            return True
        return tags[WIDTH] * tags[HEIGHT] > SMALL or (deep and max(tags.get(BITS, (1,))) > 8)
    except Exception:  # not a TIFF, or damaged: the decoder says so
        return False


def read_rgb(path: str) -> np.ndarray:
    """A file as a picture to look at, uint8 RGB ``[H, W, 3]``; see ``Raster.picture`` for rasters."""
    if find_spec('rasterio') is None or not is_raster(path, deep=True):
        return mmcv.imread(path, channel_order='rgb')
    with Raster(path) as raster:
        return raster.picture(raster.width, raster.height)


class Raster(AbstractContextManager):
    """An open TIFF.

    ``width`` and ``height`` are in pixels. ``bands`` are the bands that are read. ``has_gaps`` says whether pixels may
    lack a value.

    Args:
        path: any TIFF that GDAL reads.
        bands: numbers of the bands to read, from 1, in this order; by default all, without those for transparency.
        channels: number of bands that are needed. By default, bands for transparency are read, too, if there are as
            many bands as ``channels``.
        fill: value for pixels that lack one, or a value per band; for 8-bit bands it is rounded.

    Raises:
        RasterError: not a TIFF, damaged, unusable bands, numbers that are not real, or blocks that are too large.
        UserError: rasterio is not installed.
    """

    def __init__(
        self,
        path: str,
        bands: Sequence[int] | None = None,
        channels: int | None = None,
        fill: float | Sequence[float] = 0.0,
    ):
        self.rasterio: Any = require('rasterio', 'geo', f'reading {path} in windows')
        warnings.simplefilter('ignore', self.rasterio.errors.NotGeoreferencedWarning)  # infer says so itself
        self.path = path
        name = os.path.abspath(path)  # GDAL gives other meanings to names such as http://...
        try:
            name.encode()
        except UnicodeEncodeError:
            raise RasterError(f'{path!a} is not a valid name for a raster: GDAL requires UTF-8; rename it') from None
        with self.errors('cannot be read as a TIFF'):
            self.source = self.rasterio.open(name, driver='GTiff')
            try:
                self._read_header(bands, channels, np.size(fill))
            except Exception:
                self.source.close()
                raise
        self.fill = np.broadcast_to(np.asarray(fill, np.float32), len(self.bands))
        if self.dtype == np.uint8:
            self.fill = self.fill.round().clip(0, 255).astype(np.uint8)

    def __exit__(self, *error) -> None:
        self.source.close()

    def _read_header(self, bands: Sequence[int] | None, channels: int | None, fills: int) -> None:
        source = self.source
        kinds = [kind.name for kind in source.colorinterp]
        every = tuple(range(1, source.count + 1))
        opaque = tuple(band for band in every if kinds[band - 1] != 'alpha')
        self.bands = tuple(bands or (every if channels == len(every) or not opaque else opaque))
        self.width, self.height, self.files = source.width, source.height, source.files
        self.has_palette = kinds[0] == 'palette'
        self._check(fills)
        self.stored = np.dtype(source.dtypes[0])  # a TIFF has one type for all bands
        self.dtype = np.dtype(np.uint8 if self.stored == np.uint8 else np.float32)
        self.block = source.block_shapes[0]
        flags = {flag.name for flag in source.mask_flag_enums[self.bands[0] - 1]}
        self.nodata = source.nodata if 'nodata' in flags else None
        reads_alpha = any(kinds[band - 1] == 'alpha' for band in self.bands)
        self.masked = 'per_dataset' in flags and not ('alpha' in flags and reads_alpha)
        self.has_gaps = self.masked or self.nodata is not None or self.stored.kind == 'f'

    def _check(self, fills: int) -> None:
        count = self.source.count
        foreign = [band for band in self.bands if band not in range(1, count + 1)]
        if foreign:
            raise RasterError(f'{self.path} has {bands_in_words(count)}, so there is no band {foreign[0]}')
        if fills not in (1, len(self.bands)):
            own = bands_in_words(len(self.bands))
            raise RasterError(f'{self.path}: {own} are read, but fill of LoadRasterFromFile has {fills} values')
        kind = self.source.dtypes[0]
        if not kind.startswith(('int', 'uint', 'float')):
            raise RasterError(f'{self.path} holds {kind} numbers; real ones are supported')
        if self.width * self.height > LARGEST:
            raise RasterError(f'{self.path} claims {self.width} x {self.height} pixels; 2^40 are supported')
        height, width = self.source.block_shapes[0]
        together = count if self.source.interleaving.name == 'pixel' else 1
        size = height * width * together * np.dtype(kind).itemsize
        if size > LARGEST_BLOCK:
            raise RasterError(
                f'{self.path} is stored in blocks of {width} x {height} pixels, {size >> 20} MiB each; '
                'store it in tiles: gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER IN OUT'
            )

    @cached_property
    def georeference(self) -> dict[str, Any]:
        """``crs``, ``transform``, ``gcps``, ``rpcs`` and ``tags`` in rasterio's form."""
        source = self.source
        with self.errors('is damaged: its georeference cannot be read'):
            return dict(
                crs=source.crs, transform=source.transform, gcps=source.gcps, rpcs=source.rpcs, tags=source.tags()
            )

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Values ``[bands, height, width]``, uint8 or float32, and which pixels are void, bool ``[height, width]``.

        A pixel is void if all bands lack a value, if one is NaN or infinite, or if the file's mask or transparency says
        so. Values that are missing are ``fill``. None stands for no void pixels.
        """
        values = self.read_stored(top, left, height, width)
        mask = None
        if self.masked:
            with self.errors('is damaged: its mask cannot be read'):
                mask = self.source.read_masks(self.bands[0], window=self.window(top, left, height, width))
        void = np.zeros((height, width), bool) if mask is None else mask == 0
        missing = None
        if self.nodata is not None:
            whole = float(self.nodata).is_integer() and self.stored.kind != 'f'
            missing = values == (int(self.nodata) if whole else self.nodata)
            void |= missing.all(0)
        if self.stored.kind == 'f':
            odd = ~np.isfinite(values)
            void |= odd.any(0)
            missing = odd if missing is None else missing | odd
        values = values.astype(self.dtype, copy=False)
        if missing is not None and missing.any():
            values = np.where(missing, self.fill[:, None, None], values)
        if void.any():
            values[:, void] = self.fill[:, None]
            return values, void
        return values, None

    def read_stored(
        self, top: int, left: int, height: int, width: int, bands: Sequence[int] | None = None
    ) -> np.ndarray:
        """Values ``[bands, height, width]`` as they are stored."""
        with self.errors(f'is damaged: rows {top} to {top + height - 1} cannot be read'):
            return self.source.read(list(bands or self.bands), window=self.window(top, left, height, width))

    def window(self, top: int, left: int, height: int, width: int) -> Any:
        """A window in rasterio's form."""
        return self.rasterio.windows.Window(left, top, width, height)

    def parts(self) -> Iterator[tuple[int, int, int, int]]:
        """Places for ``read`` that cover everything: a megapixel, or a row, at most, and whole blocks of the file."""
        height, width = self.block
        wide = width * max(1, PART // width)
        tall = max(1, PART**2 // wide)
        tall -= tall % height if tall > height else 0
        for top in range(0, self.height, tall):
            for left in range(0, self.width, wide):
                yield top, left, min(tall, self.height - top), min(wide, self.width - left)

    def reduced(self, width: int, height: int, bands: Sequence[int] | None = None) -> np.ndarray:
        """Values ``[bands, height, width]`` of the nearest pixels, as they are stored; each block is decoded once."""
        rows, columns = (
            (2 * np.arange(few) + 1) * many // (2 * few) for few, many in ((height, self.height), (width, self.width))
        )
        values = np.zeros((len(bands or self.bands), height, width), self.stored)
        for top, left, tall, wide in self.parts():
            y = slice(*np.searchsorted(rows, (top, top + tall)))
            x = slice(*np.searchsorted(columns, (left, left + wide)))
            if y.start < y.stop and x.start < x.stop:
                part = self.read_stored(top, left, tall, wide, bands)
                values[:, y, x] = part[:, rows[y, None] - top, columns[x] - left]
        return values

    def picture(self, width: int, height: int) -> np.ndarray:
        """The first three bands, or the first alone, as uint8 RGB ``[height, width, 3]``.

        8-bit values are shown as they are; others are stretched from their 2nd to their 98th percentile.
        """
        shown = self.bands[:3] if len(self.bands) >= 3 else self.bands[:1] * 3
        values = self.reduced(width, height, shown)
        if values.dtype != np.uint8:
            values = np.stack([self._stretched(band.astype(np.float32)) for band in values])
        return np.ascontiguousarray(values.transpose(1, 2, 0))

    def _stretched(self, band: np.ndarray) -> np.ndarray:
        known = np.isfinite(band) if self.nodata is None else np.isfinite(band) & (band != np.float32(self.nodata))
        if not known.any():
            return np.zeros(band.shape, np.uint8)
        low, high = np.percentile(band[known], STRETCH)
        scaled = (band - low) * (255 / max(high - low, np.finfo(np.float32).tiny))
        return np.where(known, scaled, 0).clip(0, 255).astype(np.uint8)

    @contextmanager
    def errors(self, problem: str) -> Iterator[None]:
        """Raise GDAL's errors as ``RasterError``, and limit its memory in this thread."""
        with self.rasterio.Env(GDAL_CACHEMAX=CACHE):
            try:
                yield
            except gdal_errors(self.rasterio) as error:
                raise RasterError(f'{self.path} {problem} ({reason(error)})') from None


def gdal_errors(rasterio: Any) -> tuple[type[Exception], ...]:
    """Types of the exceptions that rasterio raises; few calls pass on GDAL's own."""
    return rasterio.errors.RasterioError, rasterio._err.CPLE_BaseError


def reason(error: BaseException | None) -> str:
    """GDAL's first words about an error of rasterio."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return ' '.join(str(getattr(error, 'errmsg', error)).split())


def bands_in_words(count: int) -> str:
    """1 band, 2 bands."""
    return f'{count} band{"s" * (count != 1)}'
