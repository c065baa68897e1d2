#!/usr/bin/env python
"""Segment rasters of 30,000 columns in a GiB of memory, compare with pictures in memory, and kill runs at random."""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from common import Report, arguments, kill, start_child, wait
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from mmseg_volo.apis import infer
from mmseg_volo.config import load_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from raster_files import landscape, write_checkpoint, write_config  # noqa: E402

GIB = 1 << 20  # in KiB, as the kernel counts
WIDTH, TILE = 30_000, 512
SHORT, LONG = (3_000, 3), (30_000, 20)  # rows of the largest raster, kills
CHILD = """
import sys
from mmseg_volo.apis import infer
infer(*sys.argv[1:3], sys.argv[3:4], sys.argv[4], 'cpu', ['labels', 'overlay'])
print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def main() -> None:
    args = arguments(__doc__)
    rows, kills = SHORT if args.short else LONG
    report = Report('large rasters')
    with tempfile.TemporaryDirectory(prefix='soak_') as folder:
        place = Path(folder)
        same_labels(report, place)
        killed(report, place, kills)
        narrow = write_config(place / 'narrow.py', crop=(512, 512), stride=(512, 512))
        models = {
            'a narrow VOLO, 3 classes, windows of 512 x 512': (
                narrow,
                write_checkpoint(place / 'narrow.pth', narrow),
                rows,
            ),
            'VOLO-tiny + UPerNet, 11 classes, windows of 320 x 240': ('volo_tiny_camvid', camvid(place), 400),
        }
        for what, (config, checkpoint, height) in models.items():
            raster = write_large(place / 'large.tif', height)
            start = time.monotonic()
            run = subprocess.run(
                [sys.executable, '-c', CHILD, config, checkpoint, raster, place / 'out'],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert run.returncode == 0, run.stdout
            peak, seconds = int(run.stdout.split()[-1]), time.monotonic() - start
            row = f'{WIDTH} x {height}, {what}: peak of resident memory in MiB'
            report.row(row, f'{peak / 1024:.0f} after {seconds:.0f} s', 1024, peak <= GIB)
    report.finish()


def write_large(path: Path, height: int) -> Path:
    """A raster of three bands, written tile by tile."""
    settings = dict(driver='GTiff', width=WIDTH, height=height, count=3, dtype='uint8', crs='EPSG:32633')
    settings |= dict(tiled=True, blockxsize=TILE, blockysize=TILE, compress='deflate', zlevel=1, bigtiff='if_safer')
    tiles = [landscape(TILE, TILE, seed=seed) for seed in range(5)]
    with rasterio.Env(GDAL_CACHEMAX=2**25), rasterio.open(path, 'w', **settings) as file:
        for number, (_, window) in enumerate(file.block_windows()):
            file.write(tiles[number % 5][:, : window.height, : window.width], window=window)
    return path


def camvid(place: Path) -> str:
    """Random weights for ``volo_tiny_camvid``."""
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(load_config('volo_tiny_camvid', {}).model)
    meta = dict(dataset_meta=DATASETS.get('CamVidDataset').METAINFO)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), place / 'camvid.pth')
    return str(place / 'camvid.pth')


def same_labels(report: Report, place: Path) -> None:
    """Compare labels of 2,000 x 7,000 pixels, computed in several strips, with those of the picture in memory."""
    for weighting in ('uniform', 'hann'):
        config, checkpoint, raster = medium(place, weighting)
        infer(config, checkpoint, [raster], str(place / weighting), 'cpu', ['labels'])
        model = MODELS.build(load_config(config, {}).model).eval()
        model.load_state_dict(torch.load(checkpoint)['state_dict'])
        with rasterio.open(raster) as file, rasterio.open(place / weighting / 'pred/medium.tif') as labels:
            picture, found = torch.from_numpy(file.read()[::-1].copy()), labels.read(1)
        different = np.count_nonzero(found != model.segment(picture, found.shape).numpy())
        report.row(
            f'7,000 x 2,000, {weighting}: labels that differ from those of the picture in memory',
            different,
            0,
            not different,
        )


def medium(place: Path, weighting: str = 'uniform') -> tuple[str, str, str]:
    """Config, checkpoint and a raster of 7,000 x 2,000 pixels."""
    more = f"model['test_cfg']['weighting'] = {weighting!r}\n"
    config = write_config(place / f'{weighting}.py', crop=(256, 256), stride=(160, 200), more=more)
    raster = place / 'medium.tif'
    if not raster.exists():
        settings = dict(driver='GTiff', width=7000, height=2000, count=3, dtype='uint8', crs='EPSG:32633')
        with rasterio.open(raster, 'w', **settings) as file:
            file.write(landscape(2000, 7000))
    return config, write_checkpoint(place / f'{weighting}.pth', config), str(raster)


def killed(report: Report, place: Path, count: int) -> None:
    """Kill a run at random moments; ``--resume`` must end with the file of an unbroken run."""
    config, checkpoint, raster = medium(place)
    target, unbroken = place / 'killed/pred/medium.tif', place / 'uniform/pred/medium.tif'
    draw, survived, visible, differing, runs = random.Random(0), 0, 0, 0, 0
    start = time.monotonic()
    assert wait(started(config, checkpoint, raster, place / 'timed')) == 0
    seconds = time.monotonic() - start
    while survived < count:
        pid = started(config, checkpoint, raster, place / 'killed')
        time.sleep(draw.uniform(0, 0.6 * seconds))
        if kill(pid) is None:
            survived += 1
            visible += target.exists() and target.read_bytes() != unbroken.read_bytes()
        else:
            runs += 1
            differing += target.read_bytes() != unbroken.read_bytes()
            target.unlink()
    assert wait(started(config, checkpoint, raster, place / 'killed')) == 0
    differing += target.read_bytes() != unbroken.read_bytes()
    report.row('survived SIGKILLs at random moments', survived, count, survived == count)
    report.row('incomplete files with the name of a complete one', visible, 0, not visible)
    report.row(f'files of {runs + 1} runs that differ from an unbroken run', differing, 0, not differing)


def started(config: str, checkpoint: str, raster: str, out: Path) -> int:
    """Start ``infer --resume`` in a child process with its own process group; returns its id."""
    return start_child(lambda: infer(config, checkpoint, [raster], str(out), 'cpu', ['labels'], resume=True))


if __name__ == '__main__':
    main()
