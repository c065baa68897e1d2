#!/usr/bin/env python
"""Segment damaged TIFF files: tests/soak/hostile_rasters.py [--short]

Each file is read in a fork with limited memory and time. Print a table, and exit with 1 if a file ends the interpreter,
hangs, or raises anything but UserError.
"""

import os
import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import rasterio
from common import Report, arguments, wait
from tqdm import tqdm

from mmseg_volo.apis.predictor import Predictor, Undecodable
from mmseg_volo.apis.raster import RasterRun
from mmseg_volo.config import load_config
from mmseg_volo.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
from raster_files import landscape, write_checkpoint, write_config, write_raster  # noqa: E402

SHORT, LONG = 40, 1000  # files per kind
MEMORY = 1 << 30  # bytes of address space that a file may take
SECONDS = 5  # of a core; a raster that claims to have more than HUGE pixels may take longer
HUGE = 10**6
VALUES = [0, 1, 2, 3, 7, 8, 16, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1]

KINDS: dict[str, dict] = {
    'strips': dict(),
    'tiles, deflate': dict(tiled=True, blockxsize=32, blockysize=32, compress='deflate', predictor=2),
    'LZW, planes': dict(compress='lzw', interleave='band'),
    'JPEG, YCbCr': dict(tiled=True, blockxsize=32, blockysize=32, compress='jpeg', photometric='ycbcr'),
    'BigTIFF, zstd': dict(BIGTIFF='YES', compress='zstd', endianness='BIG'),
    'nodata, packbits': dict(nodata=0, compress='packbits'),
    'transparency': dict(alpha='yes', photometric='rgb'),
    '16 bits': dict(dtype='uint16', compress='deflate'),
    'mask': dict(mask=True, compress='lzma'),
    'WebP': dict(compress='webp', tiled=True, blockxsize=32, blockysize=32),
}


def made(path: Path, profile: dict) -> bytes:
    """A TIFF of 70 x 90 pixels."""
    settings = dict(profile)
    masked, kind = settings.pop('mask', False), settings.pop('dtype', 'uint8')
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_raster(path, landscape(70, 90, bands=4 if 'alpha' in settings else 3).astype(kind), **settings)
        if masked:
            with rasterio.open(path, 'r+') as file:
                file.write_mask(np.eye(70, 90) == 0)
    return path.read_bytes()


def fields(content: bytes) -> list[tuple[int, int]]:
    """Place and length of the values in the first directory: type, count, and value or offset of each tag."""
    order = '<' if content[:2] == b'II' else '>'
    big = struct.unpack_from(f'{order}H', content, 2)[0] == 43
    start = struct.unpack_from(f'{order}{"Q" if big else "I"}', content, 8 if big else 4)[0]
    count = struct.unpack_from(f'{order}{"Q" if big else "H"}', content, start)[0]
    size, first = (20, start + 8) if big else (12, start + 2)
    return [
        (first + size * number + place, length)
        for number in range(count)
        for place, length in ([(0, 2), (2, 2), (4, 8), (12, 8)] if big else [(0, 2), (2, 2), (4, 4), (8, 4)])
    ]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """``content`` with some damage: to its directory, to any bytes, to its end, or a part of it in another place."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        how = draw.choice(['field', 'field', 'field', 'flip', 'cut', 'copy'])
        if how == 'field':
            place, length = draw.choice(fields(content))
            order = 'little' if content[:2] == b'II' else 'big'
            value = draw.choice([draw.choice(VALUES), draw.getrandbits(8 * length)]) % 256**length
            changed[place : place + length] = value.to_bytes(length, order)
        elif how == 'flip':
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
        elif how == 'cut' and len(changed) > 16:
            del changed[draw.randrange(8, len(changed)) :]
        else:
            place, other, length = draw.randrange(len(changed)), draw.randrange(len(changed)), draw.randint(1, 64)
            changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


def outcome(run: RasterRun, path: Path) -> str:
    """Segment a file in a fork: how it ended."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        in_child(run, path, tell)
    os.close(tell)
    status = wait(pid)
    with os.fdopen(told, 'rb') as file:
        words = file.read().decode(errors='replace')
    if status == -signal.SIGXCPU:
        return 'goes on, as it claims to be huge' if claims(path) > HUGE else 'hangs'
    return words if status == 0 and words in ('segmented', 'refused') else f'status {status}: {words[-300:]}'


def in_child(run: RasterRun, path: Path, tell: int) -> None:
    """Segment a file, and write how it ended to the pipe ``tell``."""
    status = 1
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            run.segment(str(path), path.stem)
            words = 'segmented'
        except (Undecodable, UserError) as error:
            words = 'refused' if str(error).count('\n') == 0 and str(path) in str(error) else f'says {error}'
        os.write(tell, words.encode())
        status = 0
    except BaseException as error:
        os.write(tell, f'{type(error).__name__}: {error}'.encode())
    finally:
        os._exit(status)


def claims(path: Path) -> int:
    """Number of pixels that a file claims to have."""
    try:
        with rasterio.open(path) as file:
            return file.width * file.height
    except Exception:  # whatever the damage causes
        return 0


def main() -> None:
    args = arguments(__doc__)
    report, draw = Report('damaged rasters'), random.Random(0)
    with tempfile.TemporaryDirectory(prefix='soak_') as folder:
        place = Path(folder)
        config = write_config(place / 'config.py')
        checkpoint = write_checkpoint(place / 'random.pth', config)
        predictor = Predictor(load_config(config, {}), checkpoint, 'cpu', False, False)
        run = RasterRun((), predictor, place / 'out', ['labels', 'overlay'], 0.5, None, False)
        for kind, profile in KINDS.items():
            content = made(place / 'whole.tif', profile)
            assert outcome(run, place / 'whole.tif') == 'segmented', kind
            ends: Counter[str] = Counter()
            for number in tqdm(range(SHORT if args.short else LONG), kind, disable=None):
                path = place / f'{number}.tif'
                path.write_bytes(mutated(content, draw))
                end = outcome(run, path)
                ends[end] += 1
                if end.startswith(('status', 'hangs')):
                    tqdm.write(f'{kind}, {number}: {end}')
                path.unlink()
            wrong = sum(count for end, count in ends.items() if end.startswith(('status', 'hangs')))
            report.row(kind, ', '.join(f'{end}: {count}' for end, count in sorted(ends.items())), 0, not wrong)
    report.finish()


if __name__ == '__main__':
    main()
