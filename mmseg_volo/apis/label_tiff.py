"""Labels of rasters as tiled GeoTIFF files."""

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._files import whole
from ..errors import UserError
from ..rasters import CACHE, Raster, RasterError, gdal_errors, reason
from .predictor import VOID

BLOCK = 512  # rows and columns of a tile
TAGS = 'MMSEG_VOLO'  # namespace of the tags that say how the labels were made

Place = tuple[int, int, int, int]  # top, left, height and width


def write_label_tiff(
    target: Path,
    raster: Raster,
    blocks: Iterable[tuple[Place, np.ndarray]],
    palette: Sequence,
    circumstances: Mapping[str, str],
) -> None:
    """Write labels with the size, the georeference and the tags of ``raster``, and read them again to be sure.

    Args:
        target: the file, which appears when it is complete.
        raster: what the labels belong to.
        blocks: place and uint8 labels ``[height, width]`` of each part.
        palette: a colour per class; ``VOID`` is transparent.
        circumstances: texts that ``circumstances_of`` returns.

    Raises:
        UserError: the file cannot be written.
    """
    sums = []
    failures: tuple[type[Exception], ...] = (RasterError, *gdal_errors(raster.rasterio))
    with whole(target) as partial:
        sidecar = Path(f'{partial}.aux.xml')  # GDAL puts there what a TIFF cannot hold
        for left_over in (partial, sidecar):
            left_over.unlink(missing_ok=True)
        try:
            with _created(partial, raster) as file:
                colours = {i: tuple(map(int, colour)) for i, colour in enumerate(palette)}
                file.write_colormap(1, colours | {VOID: (0, 0, 0, 0)})
                file.update_tags(ns=TAGS, **{_tag(name): text for name, text in circumstances.items()})
                for place, labels in blocks:
                    file.write(labels, 1, window=raster.window(*place))
                    sums.append((place, zlib.crc32(labels.data)))
            with Raster(str(partial)) as written:  # GDAL does not report all errors of a full disk
                if any(zlib.crc32(written.read_stored(*place).data) != crc for place, crc in sums):
                    raise RasterError('it reads back differently')
        except failures as error:
            sidecar.unlink(missing_ok=True)
            problem = f'cannot write {target} ({reason(error)}); is the disk full? make room and go on with --resume'
            raise UserError(problem) from None
        final = Path(f'{target}.aux.xml')
        final.unlink(missing_ok=True)  # of other labels
        if sidecar.exists():
            os.replace(sidecar, final)


@contextmanager
def _created(path: Path, raster: Raster) -> Iterator[Any]:
    """A new file for labels with the georeference of ``raster``."""
    rasterio, origin = raster.rasterio, raster.georeference
    placed = {} if origin['transform'].is_identity else {'transform': origin['transform']}
    with (
        rasterio.Env(GDAL_CACHEMAX=CACHE),
        rasterio.open(
            path,
            'w',
            driver='GTiff',
            width=raster.width,
            height=raster.height,
            count=1,
            dtype='uint8',
            crs=origin['crs'],
            nodata=VOID if raster.has_gaps else None,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            compress='deflate',
            bigtiff='if_safer',
            **placed,
        ) as file,
    ):
        points, crs = origin['gcps']
        if points:
            file.gcps = points, crs or rasterio.crs.CRS()
        if origin['rpcs']:
            file.rpcs = origin['rpcs']
        file.update_tags(**{name: text for name, text in origin['tags'].items() if name not in ('ns', 'bidx')})
        yield file


def circumstances_of(path: Path) -> dict[str, str]:
    """The circumstances under which labels were made; an empty dict if the file is missing or not one of ours."""
    try:
        with Raster(str(path)) as labels:
            tags = labels.source.tags(ns=TAGS)
    except RasterError:
        return {}
    return {name.replace('_', ' '): text for name, text in tags.items()}


def _tag(name: str) -> str:
    return name.replace(' ', '_')
