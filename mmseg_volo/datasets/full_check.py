"""The full check of a config's data sets: every image and label, with a table of the classes and a picture."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from PIL import Image
from prettytable import PrettyTable

from ..config import SPLITS, load_config, output_path, set_work_dir
from ..visualization import overlay, save_whole, side_by_side, with_legend
from .checks import REDUCE_ZERO_LABEL, CheckedDataSet, abbreviated, in_threads, open_split
from .raster_checks import BandStatistics

FILES_NAMED = 3  # per finding
DRAWN, ROW_HEIGHT, MOST_WIDTH = 4, 240, 1920  # overlays per split, and their size in pixels


class Finding(NamedTuple):
    """A problem in a split, and the files that have it."""

    level: str
    split: str
    what: str
    files: Sequence[str] = ()

    def __str__(self) -> str:
        count = f' ({len(self.files)} file{"s" * (len(self.files) != 1)})' if self.files else ''
        lines = [f'{self.level}: {self.split}: {self.what}{count}', *self.files[:FILES_NAMED]]
        if len(self.files) > FILES_NAMED:
            lines.append(f'and {len(self.files) - FILES_NAMED} more')
        return '\n  '.join(lines)


def check_all_data(
    config: str, out: str | None = None, splits: Sequence[str] | None = None, cfg_options: dict | None = None
) -> list[Finding]:
    """Check every image and label; print mistakes and class frequencies, and draw some labels over their images.

    Args:
        out: PNG file of labels over images; by default ``check_data.png`` in the work dir.
        splits: any of ``'train'``, ``'val'`` and ``'test'``; by default all that the config has.

    Returns:
        The findings. An ``'error'`` harms training or evaluation; a ``'warning'`` or a ``'note'`` may be intended.

    Raises:
        UserError: the config has no such data, or ``out`` is not writable.
    """
    cfg = load_config(config, cfg_options or {})
    splits = splits or [split for split in SPLITS if cfg.get(f'{split}_dataloader')]
    if {'val', 'test'} <= set(splits) and cfg.val_dataloader.dataset == cfg.test_dataloader.dataset:
        splits = [split for split in splits if split != 'test']
        print('test: same data as val')
    tallies = {split: _SplitReport(split, open_split(cfg, split)) for split in splits}
    picture = _picture_path(cfg, config, out)
    for tally in tallies.values():
        for part in tally.parts:
            tally.add(part)
    findings = [finding for tally in tallies.values() for finding in tally.findings()]
    if 'train' in tallies:
        for split in ('val', 'test'):
            if split in tallies:
                findings += tallies[split].overlap(tallies['train'])
    labelled = [tally for tally in tallies.values() if tally.pixels.any()]
    if labelled:
        print(_class_table(labelled))
    for bands in tallies['train'].bands.values() if 'train' in tallies else ():
        print(f'train: {len(bands.mean)} bands; these lines belong into model.data_preprocessor:\n{bands}')
    for finding in findings:
        print(finding)
    drawn = [tally for tally in tallies.values() if tally.drawable]
    if drawn:
        save_whole(_overlays(drawn), picture)
        print(f'{picture}: labels over images, one row per split ({", ".join(tally.split for tally in drawn)})')
    count = sum(finding.level == 'error' for finding in findings)
    print(f'{count or "no"} error{"s" * (count != 1)} in the data of {config}')
    return findings


def _picture_path(cfg: Config, config: str, out: str | None) -> Path:
    if out is None:
        set_work_dir(cfg, config, None)
        return Path(cfg.work_dir) / 'check_data.png'
    return output_path(out)


class _SplitReport:
    """Counts and problems over all files of a split."""

    def __init__(self, split: str, parts: Sequence[CheckedDataSet]):
        self.split, self.parts = split, parts
        self.pixels, self.images = np.zeros(256, np.int64), np.zeros(256, np.int64)
        self.problems: dict[str, list[str]] = defaultdict(list)
        self.files: dict[tuple, set[str]] = defaultdict(set)  # by content
        self.drawable: list[tuple[CheckedDataSet, int]] = []
        self.bands: dict[int, BandStatistics] = {}  # by number of bands

    def add(self, part: CheckedDataSet) -> None:
        """Check every file of a data set."""
        foreign, pixels = [], np.zeros(256, np.int64)
        indices = range(len(part.dataset))
        for index, look in enumerate(in_threads(part.look, indices, self.split)):
            for what, file in look.problems:
                self.problems[what].append(file)
            if look.digest:
                self.files[look.digest].add(look.image)
            if look.bands:
                count = len(look.bands.mean)
                if count in self.bands:
                    self.bands[count].add(look.bands)
                else:
                    self.bands[count] = look.bands
            if look.drawable:
                self.drawable.append((part, index))
            if look.pixels is not None:
                pixels += look.pixels
                self.images += look.pixels > 0
                if part.foreign(look.pixels):
                    foreign.append(part.dataset.get_data_info(index)['seg_map_path'])
        if foreign:
            self.problems[part.why_foreign(pixels)] += foreign
        elif part.looks_shifted(pixels):
            self.problems.setdefault(f'ADE20K counts classes from 1 and uses 0 for void: {REDUCE_ZERO_LABEL}', [])
        self.pixels += pixels
        orphans = part.labels_without_image() if part.load else []
        if orphans:
            self.problems[f'label has no image that ends in {part.dataset.img_suffix}'] += orphans
        but = '' if part.load else '; the config loads no labels'
        print(f'{self.split}: {len(part.dataset)} images{but}')

    def findings(self) -> list[Finding]:
        """Errors in files, classes that never occur, and duplicate images."""
        found = [Finding('error', self.split, what, files) for what, files in self.problems.items()]
        classes = self.parts[0].dataset.metainfo['classes']
        absent = [name for name, images in zip(classes, self.images, strict=False) if not images]
        if absent and self.pixels.any():
            what = f'{len(absent)} of {len(classes)} classes never occur: {abbreviated(absent)}'
            # Not an error: a sample or a val split may lack a class. A class missing from train cannot be learned.
            found.append(Finding('warning' if self.split == 'train' else 'note', self.split, what))
        twice = [' = '.join(sorted(files)) for files in self.files.values() if len(files) > 1]
        if twice:
            found.append(Finding('note', self.split, 'duplicate images', twice))
        return found

    def overlap(self, train: '_SplitReport') -> list[Finding]:
        """Images that are also in ``train``."""
        shared = [
            f'{file} = {min(train.files[digest])}'
            for digest, files in self.files.items()
            if digest in train.files
            for file in sorted(files)
        ]
        what = 'image is also in train, so its score means nothing; remove it from one of them'
        return [Finding('error', self.split, what, shared)] if shared else []


def _class_table(tallies: Sequence[_SplitReport]) -> PrettyTable:
    """Share of pixels and number of images for each class and split."""
    dataset = tallies[0].parts[0].dataset
    table = PrettyTable(['class', *(f'{tally.split} {what}' for tally in tallies for what in ('pixels', 'images'))])
    table.align = 'r'
    table.align['class'] = 'l'
    for i, name in [*enumerate(dataset.metainfo['classes']), (dataset.ignore_index, 'void')]:
        row = [(f'{tally.pixels[i] / tally.pixels.sum():.3%}', tally.images[i]) for tally in tallies]
        table.add_row([name, *(cell for cells in row for cell in cells)])
    return table


def _overlays(tallies: Sequence[_SplitReport]) -> Image.Image:
    """Labels over images, one row per split, and a legend."""
    meta = tallies[0].parts[0].dataset.metainfo
    rows, labels = [], []
    for tally in tallies:
        row = []
        spread = np.linspace(0, len(tally.drawable) - 1, min(DRAWN, len(tally.drawable))).round().astype(int)
        for part, index in (tally.drawable[i] for i in spread):
            image, label = part.reduced(index, ROW_HEIGHT, MOST_WIDTH)
            row.append(overlay(image, label, meta['palette']))
            labels.append(label.ravel())
        rows.append(side_by_side(row))
    page = Image.new('RGB', (max(row.width for row in rows), ROW_HEIGHT * len(rows)), 'white')
    for n, row in enumerate(rows):
        page.paste(row, (0, n * ROW_HEIGHT))
    return with_legend(page, np.concatenate(labels), meta['classes'], meta['palette'])
