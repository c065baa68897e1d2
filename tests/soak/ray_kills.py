#!/usr/bin/env python
"""Kill workers of inference through Ray Data; the results must be those of a single process, none lost or doubled."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from common import CONFIG, Report, arguments, toy_place
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from PIL import Image

from mmseg_volo._files import PARTIAL
from mmseg_volo.apis.inference import infer
from mmseg_volo.config import load_config

SHORT, LONG = (40, 1), (2000, 3)  # pictures, kills
SIZE = 96, 64


def main() -> None:
    args = arguments(__doc__)
    count, kills = SHORT if args.short else LONG
    report = Report('kill workers of infer --ray')
    with toy_place(1, 1) as place:
        pictures, checkpoint = place / 'pictures', str(place / 'random.pth')
        make_pictures(pictures, count)
        make_checkpoint(checkpoint)
        seconds = {}
        for out, ray in (('alone', None), ('shared', 'local')):
            start = time.monotonic()
            infer(str(CONFIG), checkpoint, [str(pictures)], str(place / out), 'cpu', ['labels'], ray=ray)
            seconds[out] = time.monotonic() - start
        report.row('seconds, one process and two workers', [f'{value:.1f}' for value in seconds.values()], '', True)
        compare(report, 'two workers', place / 'shared', place / 'alone')

        killer = Killer(place / 'killed', count, kills)
        killer.start()
        bad = infer(str(CONFIG), checkpoint, [str(pictures)], str(place / 'killed'), 'cpu', ['labels'], ray='local')
        killer.join(10)  # by then all kills are done, or there is nobody left to kill
        report.row('workers killed', len(killer.killed), kills, len(killer.killed) == kills)
        report.row('files reported as damaged', len(bad), 0, not bad)
        compare(report, 'killed workers', place / 'killed', place / 'alone')

        gone = sorted((place / 'killed/pred').iterdir())[::7]
        kept = {path: path.stat().st_mtime_ns for path in (place / 'killed/pred').iterdir() if path not in gone}
        for path in gone:
            path.unlink()
        infer(
            str(CONFIG), checkpoint, [str(pictures)], str(place / 'killed'), 'cpu', ['labels'], ray='local', resume=True
        )
        again = [path for path, written in kept.items() if path.stat().st_mtime_ns != written]
        report.row('finished files that --resume wrote again', len(again), 0, not again)
        compare(report, f'--resume after {len(gone)} were deleted', place / 'killed', place / 'alone')
    report.finish()


def make_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f'{i:05}.png')


def make_checkpoint(path: str) -> None:
    """Random weights that predict several classes."""
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(load_config(str(CONFIG), {}).model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    meta = DATASETS.get('CityscapesDataset').METAINFO
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), path)


class Killer(threading.Thread):
    """Kills workers of this process's Ray, at moments spread over the run."""

    def __init__(self, out: Path, count: int, kills: int):
        super().__init__(daemon=True)
        self.out, self.killed = out / 'pred', []
        draw = random.Random(0)
        self.moments = sorted(draw.uniform(0.1, 0.8) * count for _ in range(kills))

    def run(self) -> None:
        for moment in self.moments:
            while not self.out.exists() or len(list(self.out.iterdir())) < moment:
                time.sleep(0.02)
            while not (workers := [pid for pid in descendants(os.getpid()) if is_busy_worker(pid)]):
                time.sleep(0.02)
            os.kill(workers[0], signal.SIGKILL)
            self.killed.append(workers[0])


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``."""
    try:
        children = [
            int(word)
            for task in Path(f'/proc/{pid}/task').iterdir()
            for word in (task / 'children').read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [below for child in children for below in descendants(child)]


def is_busy_worker(pid: int) -> bool:
    try:
        return b'MapWorker' in Path(f'/proc/{pid}/cmdline').read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended


def compare(report: Report, what: str, out: Path, reference: Path) -> None:
    names, expected = ({path.name for path in (folder / 'pred').iterdir()} for folder in (out, reference))
    partial = [name for name in names if name.startswith(PARTIAL)]
    different = [
        name
        for name in names & expected
        if (out / 'pred' / name).read_bytes() != (reference / 'pred' / name).read_bytes()
    ]
    report.row(f'{what}: label maps missing or too many', len(names ^ expected), 0, names == expected)
    report.row(
        f'{what}: label maps that differ, partial files',
        (len(different), len(partial)),
        (0, 0),
        not different + partial,
    )


if __name__ == '__main__':
    sys.exit(main())
