"""The data of a config: a sample of the labels before every run, every file before a run of days."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image, ImageOps
from prettytable import PrettyTable
from tqdm import tqdm

from ..config import SPLITS, data_sets, decode_heads, load_config, output_path, set_work_dir, type_name
from ..errors import UserError
from ..visualization import overlay, save_whole, side_by_side, with_legend

MAX_LABELS_CHECKED = 500  # per split, spread evenly: seconds, where Cityscapes' 2975 labels would take minutes
FILES_NAMED = 3  # of each finding
NAMES_LISTED = 8  # ids or classes in one line
SMEARED = 32  # more ids of no class than a wrong list of classes has
DRAWN, ROW_HEIGHT, MOST_WIDTH = 4, 240, 1920  # overlays per split, and their size in pixels
REDUCE_ZERO_LABEL = 'set reduce_zero_label=True in the data set and in LoadAnnotations'


class Finding(NamedTuple):
    """What is true of a split, and of which of its files."""

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


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Raise ``UserError`` unless each split's folders are there and a sample of its labels is sound."""
    if int(os.environ.get('RANK', 0)) != 0:  # one process looks for all
        return
    for split in splits:
        for data in _open(cfg, split):
            if data.load is None:
                continue
            count = min(len(data.dataset), MAX_LABELS_CHECKED)
            indices = np.linspace(0, len(data.dataset) - 1, count).round().astype(int).tolist()
            with closing(_in_threads(data.label_problem, indices, f'labels of {split}')) as problems:
                found = next(filter(None, problems), None)
            if found:
                raise UserError(': '.join(found))
            print(f'{split}: {len(data.dataset)} images, {count} labels checked, ids within {data.num_classes} classes')


def check_all_data(
    config: str, out: str | None = None, splits: Sequence[str] | None = None, cfg_options: dict | None = None
) -> list[Finding]:
    """Look at every image and label, print what is wrong and how often each class occurs, and draw some of them.

    Args:
        out: picture of labels over their images, ``check_data.png`` in the work dir by default.
        splits: of ``'train'``, ``'val'`` and ``'test'``; by default those that the config has.

    Returns:
        What was found. An ``'error'`` spoils training or its measure; a ``'warning'`` or a ``'note'`` may be intended.

    Raises:
        UserError: there is nothing to look at, or nowhere to write.
    """
    cfg = load_config(config, cfg_options or {})
    splits = splits or [split for split in SPLITS if cfg.get(f'{split}_dataloader')]
    if {'val', 'test'} <= set(splits) and cfg.val_dataloader.dataset == cfg.test_dataloader.dataset:
        splits = [split for split in splits if split != 'test']
        print('test: the same data as val')
    tallies = {split: _Tally(split, _open(cfg, split)) for split in splits}
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
        print(_table(labelled))
    for finding in findings:
        print(finding)
    drawn = [tally for tally in tallies.values() if tally.drawable]
    if drawn:
        save_whole(_overlays(drawn), picture)
        print(f'{picture}: labels over images, a row each of {", ".join(tally.split for tally in drawn)}')
    count = sum(finding.level == 'error' for finding in findings)
    print(f'{count or "no"} error{"s" * (count != 1)} in the data of {config}')
    return findings


def _picture_path(cfg: Config, config: str, out: str | None) -> Path:
    if out is None:
        set_work_dir(cfg, config, None)
        return Path(cfg.work_dir) / 'check_data.png'
    return output_path(out)


class _Wrong(Exception):
    """What is wrong, in words that all such files share, and the file, with what is its own."""

    def __init__(self, what: str, file: str):
        super().__init__(what, file)


@dataclass
class _Look:
    """What one image and its label show."""

    image: str
    digest: tuple | None = None
    pixels: np.ndarray | None = None
    drawable: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)


class _DataSet:
    """One data set of a split, read as training reads it; mistakes in the config raise ``UserError``."""

    def __init__(self, settings: dict, split: str, num_classes: int):
        root = settings.get('data_root') or ''
        for folder in settings.get('data_prefix', {}).values():
            if not (Path(root) / folder).is_dir():
                raise UserError(
                    f'no folder {Path(root) / folder}; docs/data.md says how to make it, '
                    'and --cfg-options data_root=FOLDER points elsewhere'
                )
        self.dataset = DATASETS.build({**settings, 'pipeline': []})
        pipeline = settings.get('pipeline', [])
        self.load = next((TRANSFORMS.build(step) for step in pipeline if type_name(step) == 'LoadAnnotations'), None)
        self.num_classes = num_classes
        if self.load and not self.dataset.data_prefix.get('seg_map_path'):
            raise UserError(f'the {split} data loads labels, but has no data_prefix.seg_map_path to load them from')
        if len(self.dataset) == 0:
            raise UserError(f'no images for {split} under {root}; docs/data.md says how the folder must look')
        classes = self.dataset.metainfo['classes']
        if len(classes) != num_classes:
            raise UserError(
                f'the {split} data has {len(classes)} classes, but decode_head.num_classes is {num_classes}'
            )

    def look(self, index: int) -> _Look:
        """At one image, and at its label where the config loads labels."""
        info = self.dataset.get_data_info(index)
        look = _Look(info['img_path'])
        size = None
        try:
            image = _read_image(look.image)
            size = image.size
            look.digest = size, hashlib.blake2b(image.tobytes()).digest()
        except Exception as error:  # whatever the decoder raises
            look.problems.append(('image cannot be decoded; get it again', f'{look.image} ({error})'))
        if self.load is None:
            return look
        try:
            label = self.read_label(info)
        except _Wrong as wrong:
            look.problems.append(wrong.args)
            return look
        look.pixels = np.bincount(label.ravel(), minlength=256)
        look.drawable = size == label.shape[::-1]
        if size and not look.drawable:
            sizes = f'{label.shape[1]} x {label.shape[0]}, not {size[0]} x {size[1]}'
            look.problems.append(('label differs in size from its image', f'{info["seg_map_path"]} ({sizes})'))
        return look

    def label_problem(self, index: int) -> tuple[str, str] | None:
        """What is wrong with one label, and its file."""
        info = self.dataset.get_data_info(index)
        try:
            pixels = np.bincount(self.read_label(info).ravel(), minlength=256)
        except _Wrong as wrong:
            return wrong.args
        return (self.why_foreign(pixels), info['seg_map_path']) if self.foreign(pixels) else None

    def read_label(self, info: dict) -> np.ndarray:
        """Ids ``[H, W]`` as training sees them; raises ``_Wrong``."""
        path = info['seg_map_path']
        if not Path(path).is_file():
            if Path(path.replace('_labelTrainIds.png', '_labelIds.png')).is_file():
                raise _Wrong('image has no label, only labelIds; docs/data.md has the command for labelTrainIds', path)
            raise _Wrong('image has no label; docs/data.md says how to make it', path)
        try:
            with Image.open(path) as picture:
                lossy, wide = picture.format == 'JPEG', _exceeds_a_byte(picture)
            label = self.load(info)['gt_seg_map']
        except Exception as error:  # whatever the decoder raises
            raise _Wrong('label cannot be read', f'{path} ({error})') from None
        if lossy:
            raise _Wrong('label is a JPEG, whose ids are blurred at every edge; make it again as PNG', path)
        if label.ndim != 2:
            raise _Wrong('label must be class ids, one per pixel, not colours', path)
        if wide:
            raise _Wrong('label has numbers outside 0 to 255, which mmseg reads modulo 256; make it again', path)
        return label

    def foreign(self, pixels: np.ndarray) -> list[int]:
        """Ids that occur and are neither a class nor void."""
        ids = np.flatnonzero(pixels).tolist()
        return [i for i in ids if i >= self.num_classes and i != self.dataset.ignore_index]

    def why_foreign(self, pixels: np.ndarray) -> str:
        """The ids of no class, and the mistake that explains them best."""
        foreign, n, void = self.foreign(pixels), self.num_classes, self.dataset.ignore_index
        if foreign == [n] and not self.dataset.reduce_zero_label:
            if pixels[0]:
                why = f"if 0 is void, as in ADE20K, {REDUCE_ZERO_LABEL}; if {n} is, as in SegNet's, make it {void}"
            else:
                why = f'id 0 never occurs, so they count from 1: {REDUCE_ZERO_LABEL}'
        elif n == 19 and len(foreign) > 1 and foreign[-1] <= 33:
            why = "they look like Cityscapes' labelIds; docs/data.md has the command for labelTrainIds"
        elif len(foreign) > SMEARED:
            why = 'so many come from a lossy format or from a resize that interpolates; make the labels again'
        else:
            why = 'docs/data.md says how to make the labels'
        ids = f'id{"s" * (len(foreign) > 1)} {_listed(foreign)}'
        return f'{ids} in labels of {n} classes (0 to {n - 1}, and {void} for void); {why}'

    def looks_shifted(self, pixels: np.ndarray) -> bool:
        """Whether these are ADE20K's own ids, of which a sample may lack 150, read as if they counted from 0."""
        dataset = self.dataset
        raw = isinstance(dataset, ADE20KDataset) and not dataset.reduce_zero_label
        return raw and pixels[0] > 0 and pixels[dataset.ignore_index] == 0

    def labels_without_image(self) -> list[str]:
        """Labels that no image goes with."""
        dataset = self.dataset
        folder = dataset.data_prefix['seg_map_path']
        names = list_dir_or_file(folder, list_dir=False, suffix=dataset.seg_map_suffix, recursive=True)
        stems = sorted(name.removesuffix(dataset.seg_map_suffix) for name in names)
        images = Path(dataset.data_prefix['img_path'])
        return [
            str(Path(folder, stem + dataset.seg_map_suffix))
            for stem in stems
            if not (images / (stem + dataset.img_suffix)).is_file()
        ]


class _Tally:
    """What all files of a split add up to."""

    def __init__(self, split: str, parts: Sequence[_DataSet]):
        self.split, self.parts = split, parts
        self.pixels, self.images = np.zeros(256, np.int64), np.zeros(256, np.int64)
        self.problems: dict[str, list[str]] = defaultdict(list)
        self.files: dict[tuple, set[str]] = defaultdict(set)  # by content
        self.drawable: list[tuple[_DataSet, int]] = []

    def add(self, part: _DataSet) -> None:
        """Look at every file of a data set."""
        foreign, pixels = [], np.zeros(256, np.int64)
        indices = range(len(part.dataset))
        for index, look in enumerate(_in_threads(part.look, indices, self.split)):
            for what, file in look.problems:
                self.problems[what].append(file)
            if look.digest:
                self.files[look.digest].add(look.image)
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
            self.problems.setdefault(f'ADE20K counts from 1, with 0 for void: {REDUCE_ZERO_LABEL}', [])
        self.pixels += pixels
        orphans = part.labels_without_image() if part.load else []
        if orphans:
            self.problems[f'label has no image that ends in {part.dataset.img_suffix}'] += orphans
        but = '' if part.load else ', whose labels the config does not load'
        print(f'{self.split}: {len(part.dataset)} images{but}')

    def findings(self) -> list[Finding]:
        """Errors in files; classes that never occur; images that occur twice."""
        found = [Finding('error', self.split, what, files) for what, files in self.problems.items()]
        classes = self.parts[0].dataset.metainfo['classes']
        absent = [name for name, images in zip(classes, self.images, strict=False) if not images]
        if absent and self.pixels.any():
            what = f'{len(absent)} of {len(classes)} classes never occur: {_listed(absent)}'
            # No error: a sample, or a val split, may well lack a class; but nobody learns what train lacks.
            found.append(Finding('warning' if self.split == 'train' else 'note', self.split, what))
        twice = [' = '.join(sorted(files)) for files in self.files.values() if len(files) > 1]
        if twice:
            found.append(Finding('note', self.split, 'the same image more than once', twice))
        return found

    def overlap(self, train: '_Tally') -> list[Finding]:
        """Images that are in ``train`` as well."""
        shared = [
            f'{file} = {min(train.files[digest])}'
            for digest, files in self.files.items()
            if digest in train.files
            for file in sorted(files)
        ]
        what = 'image is in train, too, so its score says nothing; take it out of one'
        return [Finding('error', self.split, what, shared)] if shared else []


def _open(cfg: Config, split: str) -> list[_DataSet]:
    """The data sets of a split, each once however often it is repeated."""
    if not cfg.get(f'{split}_dataloader'):
        raise UserError(f'the config has no {split}_dataloader')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    once = []
    for settings in data_sets(cfg[f'{split}_dataloader'].dataset):
        if settings not in once:
            once.append(settings)
    return [_DataSet(settings, split, decode_heads(cfg)[-1].num_classes) for settings in once]


def _in_threads(look: Callable, items: Sequence, title: str) -> Iterator:
    """Results in order; by threads, because decoders run outside Python's lock and a process imports mmseg first."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from tqdm(pool.map(look, items), title, len(items), unit='file', leave=False, delay=1, disable=None)
        finally:
            pool.shutdown(cancel_futures=True)


def _read_image(path: str) -> Image.Image:
    """Image, turned as its EXIF says, which mmcv does too; PIL can say why it does not decode."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def _exceeds_a_byte(label: Image.Image) -> bool:
    if label.mode[0] not in 'IF':
        return False
    low, high = label.getextrema()
    return low < 0 or high > 255


def _listed(values: Sequence) -> str:
    more = f' and {len(values) - NAMES_LISTED} more' if len(values) > NAMES_LISTED else ''
    return ', '.join(map(str, values[:NAMES_LISTED])) + more


def _table(tallies: Sequence[_Tally]) -> PrettyTable:
    """Share of the pixels, and number of images, of each class in each split."""
    dataset = tallies[0].parts[0].dataset
    table = PrettyTable(['class', *(f'{tally.split} {what}' for tally in tallies for what in ('pixels', 'images'))])
    table.align = 'r'
    table.align['class'] = 'l'
    for i, name in [*enumerate(dataset.metainfo['classes']), (dataset.ignore_index, 'void')]:
        row = [(f'{tally.pixels[i] / tally.pixels.sum():.3%}', tally.images[i]) for tally in tallies]
        table.add_row([name, *(cell for cells in row for cell in cells)])
    return table


def _overlays(tallies: Sequence[_Tally]) -> Image.Image:
    """Labels over their images, a row for each split, and the legend."""
    meta = tallies[0].parts[0].dataset.metainfo
    rows, labels = [], []
    for tally in tallies:
        row = []
        spread = np.linspace(0, len(tally.drawable) - 1, min(DRAWN, len(tally.drawable))).round().astype(int)
        for part, index in (tally.drawable[i] for i in spread):
            info = part.dataset.get_data_info(index)
            image = _read_image(info['img_path']).convert('RGB')
            size = min(max(1, round(image.width * ROW_HEIGHT / image.height)), MOST_WIDTH), ROW_HEIGHT
            label = np.asarray(Image.fromarray(part.read_label(info)).resize(size, Image.Resampling.NEAREST))
            row.append(overlay(np.asarray(image.resize(size)), label, meta['palette']))
            labels.append(label.ravel())
        rows.append(side_by_side(row))
    page = Image.new('RGB', (max(row.width for row in rows), ROW_HEIGHT * len(rows)), 'white')
    for n, row in enumerate(rows):
        page.paste(row, (0, n * ROW_HEIGHT))
    return with_legend(page, np.concatenate(labels), meta['classes'], meta['palette'])
