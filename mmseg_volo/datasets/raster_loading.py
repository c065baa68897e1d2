"""Pipeline steps that read rasters, whole or in windows, with any number of bands."""

from collections.abc import Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from .._extras import require
from ..errors import UserError
from ..models.backbone import are_positive
from ..rasters import Raster, RasterError


@TRANSFORMS.register_module()
class LoadRasterFromFile(BaseTransform):
    """Read a TIFF with any number of bands, 8 or 16 bits or floating point, in place of ``LoadImageFromFile``.

    ``img`` becomes ``[H, W, bands]``: uint8 if the bands are stored so, otherwise float32, with the file's values.
    The channels are in the order of ``bands``, so ``data_preprocessor`` needs no ``bgr_to_rgb``.

    Args:
        bands: numbers of the bands to read, from 1; by default all, without those for transparency.
        crop_size: (height, width) of a random window, to which reading is confined; by default the whole raster is
            read. The window is smaller if the raster is. ``LoadRasterAnnotations`` reads the same window of the label.
        fill: value for pixels that lack one, or a value per band; with the ``mean`` of ``data_preprocessor``, the model
            gets zeros there.

    Raises:
        UserError: an argument has an invalid value, rasterio is not installed, or the file cannot be read.
    """

    def __init__(
        self,
        bands: Sequence[int] | None = None,
        crop_size: tuple[int, int] | None = None,
        fill: float | Sequence[float] = 0.0,
    ):
        require('rasterio', 'geo', 'LoadRasterFromFile')
        if bands is not None and not are_positive(bands, len(bands)):
            raise UserError(f'bands of LoadRasterFromFile must be numbers from 1, got {bands!r}')
        if crop_size is not None and not are_positive(crop_size, 2):
            raise UserError(f'crop_size of LoadRasterFromFile must be (height, width), got {crop_size!r}')
        self.bands, self.crop_size, self.fill = bands, crop_size, fill

    def transform(self, results: dict) -> dict:
        """Add ``img``, ``img_shape``, ``ori_shape`` and ``raster_window``."""
        with Raster(results['img_path'], self.bands, fill=self.fill) as raster:
            whole = raster.height, raster.width
            height, width = (min(pair) for pair in zip(whole, self.crop_size or whole, strict=True))
            top, left = (np.random.randint(most + 1) for most in (whole[0] - height, whole[1] - width))
            values, _ = raster.read(top, left, height, width)
        results['raster_window'] = top, left, height, width, whole
        results['img'] = np.ascontiguousarray(values.transpose(1, 2, 0))
        results['img_shape'] = results['ori_shape'] = height, width
        return results


@TRANSFORMS.register_module()
class LoadRasterAnnotations(BaseTransform):
    """Read labels from a TIFF with one band of class ids, in place of ``LoadAnnotations``.

    After ``LoadRasterFromFile``, its window is read. Ids are taken as they are stored, also
    where the file declares them to be missing values.

    Raises:
        UserError: rasterio is not installed, the file cannot be read, it does not hold one id from 0 to 255 per pixel,
            or it differs in size from the raster.
    """

    def __init__(self):
        require('rasterio', 'geo', 'LoadRasterAnnotations')

    def transform(self, results: dict) -> dict:
        """Add ``gt_seg_map``, uint8 ``[H, W]``."""
        with LabelRaster(results['seg_map_path'], results) as labels:
            top, left, height, width, whole = results.get('raster_window', (0, 0, *labels.size, labels.size))
            if whole != labels.size:
                sizes = [f'{size[1]} x {size[0]}' for size in (labels.size, whole)]
                raise UserError(f'label {labels.path} is {sizes[0]}, but its raster is {sizes[1]}')
            results['gt_seg_map'] = labels.read_ids(top, left, height, width)
        results['seg_fields'].append('gt_seg_map')
        return results


class LabelRaster(Raster):
    """An open TIFF of class ids.

    Args:
        path: the file.
        results: the data set's ``reduce_zero_label`` and ``label_map``, which are applied as mmseg does.
    """

    def __init__(self, path: str, results: dict):
        super().__init__(path)
        self.size = self.height, self.width
        if len(self.bands) != 1 or self.stored.kind not in 'iu':
            self.source.close()
            raise RasterError(f'label {path} must have one band of class ids, not {len(self.bands)} of {self.stored}')
        self.table = np.arange(256, dtype=np.uint8)
        if results.get('reduce_zero_label'):
            self.table = np.r_[255, self.table[:254], 255].astype(np.uint8)
        if results.get('label_map'):
            renamed = np.arange(256, dtype=np.uint8)
            renamed[list(results['label_map'])] = list(results['label_map'].values())
            self.table = renamed[self.table]

    def read_ids(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Class ids in a window, uint8 ``[height, width]``."""
        return self._ids(self.read_stored(top, left, height, width))

    def reduced_ids(self, width: int, height: int) -> np.ndarray:
        """Class ids of the nearest pixels, uint8 ``[height, width]``."""
        return self._ids(self.reduced(width, height))

    def _ids(self, stored: np.ndarray) -> np.ndarray:
        [ids] = stored
        if ids.dtype != np.uint8 and (ids.min() < 0 or ids.max() > 255):
            raise RasterError(f'label {self.path} has values outside 0 to 255')
        return self.table[ids.astype(np.uint8, copy=False)]
