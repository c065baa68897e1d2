"""Checks of the data sets in a config: a sample of the labels before every run."""

import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image, ImageOps
from tqdm import tqdm

from ..config import LABEL_LOADERS, data_sets, decode_heads, type_name
from ..errors import UserError
from ..rasters import Raster, RasterError, bands_in_words
from .folder import FolderDataset
from .raster_checks import BandStatistics, count_bands, count_ids, lies_elsewhere, read_through
from .raster_loading import LabelRaster, LoadRasterAnnotations

MAX_LABELS_CHECKED = 500  # per split, evenly spaced: seconds; Cityscapes' 2975 labels would take minutes
NAMES_LISTED = 8  # ids or classes in one line
SMEARED = 32  # more foreign ids than a wrong list of classes gives
REDUCE_ZERO_LABEL = 'set reduce_zero_label=True in the data set and in LoadAnnotations'


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check folders, classes and a sample of the labels of each split; raises ``UserError`` for the first mistake."""
    if int(os.environ.get('RANK', 0)) != 0:  # one process checks for all
        return
    for split in splits:
        for data in open_split(cfg, split):
            if data.load is None:
                continue
            count = min(len(data.dataset), MAX_LABELS_CHECKED)
            indices = np.linspace(0, len(data.dataset) - 1, count).round().astype(int).tolist()
            with closing(in_threads(data.label_problem, indices, f'labels of {split}')) as problems:
                found = next(filter(None, problems), None)
            if found:
                raise UserError(': '.join(found))
            print(f'{split}: {len(data.dataset)} images, {count} labels checked, ids within {data.num_classes} classes')


class LabelError(Exception):
    """A mistake in a label.

    Args:
        what: the mistake, in the same words for all such files.
        file: the file, with details.
    """

    def __init__(self, what: str, file: str):
        super().__init__(what, file)


@dataclass
class FileCheck:
    """Results for one image and its label."""

    image: str
    digest: tuple | None = None
    pixels: np.ndarray | None = None
    bands: BandStatistics | None = None
    drawable: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)


class CheckedDataSet:
    """A data set, read as training reads it; raises ``UserError`` for mistakes in the config."""

    def __init__(self, settings: dict, split: str, num_classes: int, channels: int):
        root = settings.get('data_root') or ''
        for folder in settings.get('data_prefix', {}).values():
            if not (Path(root) / folder).is_dir():
                raise UserError(
                    f'no folder {Path(root) / folder}; docs/data.md describes how to prepare the data, '
                    'and --cfg-options data_root=FOLDER selects another folder'
                )
        self.dataset = DATASETS.build({**settings, 'pipeline': []})
        pipeline = settings.get('pipeline', [])
        self.load = _step(pipeline, *LABEL_LOADERS)
        self.raster_loader = _step(pipeline, 'LoadRasterFromFile')
        self.num_classes, self.channels = num_classes, channels
        if self.load and not self.dataset.data_prefix.get('seg_map_path'):
            raise UserError(f'the {split} data loads labels, but has no data_prefix.seg_map_path')
        if len(self.dataset) == 0:
            raise UserError(f'no images for {split} under {root}; docs/data.md describes the folder layout')
        classes = self.dataset.metainfo['classes']
        if len(classes) != num_classes:
            raise UserError(
                f'the {split} data has {len(classes)} classes, but decode_head.num_classes is {num_classes}'
            )

    def look(self, index: int) -> FileCheck:
        """Check one image, and its label if the config loads labels."""
        info = self.dataset.get_data_info(index)
        look = FileCheck(info['img_path'])
        size = None
        try:
            if self.raster_loader:
                look.problems += filter(None, [self.band_problem(info)])
                size, digest, look.bands = read_through(look.image, self.raster_loader)
            else:
                image = read_image(look.image)
                size, digest = image.size, hashlib.blake2b(image.tobytes()).digest()
            look.digest = size, digest
        except Exception as error:  # whatever the decoder raises
            look.problems.append(('image cannot be decoded; download or copy it again', f'{look.image} ({error})'))
        if self.load is None:
            return look
        try:
            look.pixels, (width, height) = self.count_label(info)
        except LabelError as wrong:
            look.problems.append(wrong.args)
            return look
        look.drawable = size == (width, height)
        if size and not look.drawable:
            sizes = f'{width} x {height}, not {size[0]} x {size[1]}'
            look.problems.append(('label differs in size from its image', f'{info["seg_map_path"]} ({sizes})'))
        if size and self.raster_loader and isinstance(self.load, LoadRasterAnnotations) and lies_elsewhere(info):
            look.problems.append(('label lies elsewhere than its raster', info['seg_map_path']))
        return look

    def band_problem(self, info: dict) -> tuple[str, str] | None:
        """The mistake in a raster's number of bands and its file, or None; raises ``RasterError``."""
        if self.raster_loader is None:
            return None
        count = count_bands(info['img_path'], self.raster_loader)
        if count == self.channels:
            return None
        model = f'data_preprocessor.mean and backbone.in_channels are for {self.channels}'
        what = f'raster has {bands_in_words(count)}, but {model}; choose them with bands of LoadRasterFromFile'
        return what, info['img_path']

    def count_label(self, info: dict) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixels per id, int64 ``[256]``, and (width, height) of a label; raises ``LabelError``."""
        if isinstance(self.load, LoadRasterAnnotations) and Path(info['seg_map_path']).is_file():
            try:
                return count_ids(info)
            except RasterError as error:
                raise LabelError('label cannot be used', str(error)) from None
        label = self.read_label(info)
        return np.bincount(label.ravel(), minlength=256), label.shape[::-1]

    def reduced(self, index: int, height: int, most_width: int) -> tuple[np.ndarray, np.ndarray]:
        """An image, uint8 RGB ``[height, W, 3]``, and its label ``[height, W]``, as a small picture."""
        info = self.dataset.get_data_info(index)
        path, loader = info['img_path'], self.raster_loader
        with Raster(path, loader.bands) if loader else read_image(path) as image:
            size = min(max(1, round(image.width * height / image.height)), most_width), height
            shown = image.picture(*size) if loader else np.asarray(image.convert('RGB').resize(size))
        if isinstance(self.load, LoadRasterAnnotations):
            with LabelRaster(info['seg_map_path'], info) as labels:
                return shown, labels.reduced_ids(*size)
        return shown, np.asarray(Image.fromarray(self.read_label(info)).resize(size, Image.Resampling.NEAREST))

    def label_problem(self, index: int) -> tuple[str, str] | None:
        """The mistake in one label, or in the number of bands of its raster, and its file, or None."""
        info = self.dataset.get_data_info(index)
        try:
            pixels, _ = self.count_label(info)
            if problem := self.band_problem(info):
                return problem
        except LabelError as wrong:
            return wrong.args
        return (self.why_foreign(pixels), info['seg_map_path']) if self.foreign(pixels) else None

    def read_label(self, info: dict) -> np.ndarray:
        """Class ids ``[H, W]`` as in training; raises ``LabelError``."""
        path = info['seg_map_path']
        if not Path(path).is_file():
            if Path(path.replace('_labelTrainIds.png', '_labelIds.png')).is_file():
                raise LabelError('image has no labelTrainIds, only labelIds; docs/data.md has the command', path)
            raise LabelError('image has no label; docs/data.md describes how to create it', path)
        try:
            with Image.open(path) as picture:
                lossy, wide = picture.format == 'JPEG', _exceeds_a_byte(picture)
            label = self.load(info)['gt_seg_map']
        except Exception as error:  # whatever the decoder raises
            raise LabelError('label cannot be read', f'{path} ({error})') from None
        if lossy:
            raise LabelError('label is a JPEG, which changes ids at every edge; create it again as PNG', path)
        if label.ndim != 2:
            raise LabelError('label must have one class id per pixel, not colours', path)
        if wide:
            raise LabelError('label has values outside 0 to 255, which mmseg reads modulo 256; create it again', path)
        return label

    def foreign(self, pixels: np.ndarray) -> list[int]:
        """Ids that are neither a class nor void."""
        ids = np.flatnonzero(pixels).tolist()
        return [i for i in ids if i >= self.num_classes and i != self.dataset.ignore_index]

    def why_foreign(self, pixels: np.ndarray) -> str:
        """The foreign ids, and the mistake that best explains them."""
        foreign, n, void = self.foreign(pixels), self.num_classes, self.dataset.ignore_index
        if foreign == [n] and not self.dataset.reduce_zero_label:
            if pixels[0]:
                why = f"if 0 is void, as in ADE20K, {REDUCE_ZERO_LABEL}; if {n} is, as in SegNet's, change it to {void}"
            else:
                why = f'id 0 never occurs, so the classes count from 1: {REDUCE_ZERO_LABEL}'
        elif n == 19 and len(foreign) > 1 and foreign[-1] <= 33:
            why = "they look like Cityscapes' labelIds; docs/data.md has the command for labelTrainIds"
        elif len(foreign) > SMEARED:
            why = 'so many ids come from a lossy format or an interpolating resize; create the labels again'
        else:
            why = 'docs/data.md describes how to create the labels'
        ids = f'id{"s" * (len(foreign) > 1)} {abbreviated(foreign)}'
        return f'{ids} in labels of {n} classes (0 to {n - 1}, and {void} for void); {why}'

    def looks_shifted(self, pixels: np.ndarray) -> bool:
        """Whether ADE20K's own ids, which count from 1, are read without ``reduce_zero_label``."""
        dataset = self.dataset
        raw = isinstance(dataset, ADE20KDataset) and not dataset.reduce_zero_label
        return raw and pixels[0] > 0 and pixels[dataset.ignore_index] == 0

    def labels_without_image(self) -> list[str]:
        """Labels without an image."""
        dataset = self.dataset
        if isinstance(dataset, FolderDataset):
            return dataset.labels_without_image()
        folder = dataset.data_prefix['seg_map_path']
        names = list_dir_or_file(folder, list_dir=False, suffix=dataset.seg_map_suffix, recursive=True)
        stems = sorted(name.removesuffix(dataset.seg_map_suffix) for name in names)
        images = Path(dataset.data_prefix['img_path'])
        return [
            str(Path(folder, stem + dataset.seg_map_suffix))
            for stem in stems
            if not (images / (stem + dataset.img_suffix)).is_file()
        ]


def open_split(cfg: Config, split: str) -> list[CheckedDataSet]:
    """The data sets of a split, each once, however often it is repeated."""
    if not cfg.get(f'{split}_dataloader'):
        raise UserError(f'the config has no {split}_dataloader')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    once = []
    for settings in data_sets(cfg[f'{split}_dataloader'].dataset):
        if settings not in once:
            once.append(settings)
    means = len((cfg.model.get('data_preprocessor') or {}).get('mean') or ())
    channels = means if means > 1 else cfg.model.backbone.get('in_channels', 3)
    return [CheckedDataSet(settings, split, decode_heads(cfg)[-1].num_classes, channels) for settings in once]


def _step(pipeline: Sequence[dict], *names: str) -> Any:
    """The first step of one of these names, built, or None."""
    return next((TRANSFORMS.build(step) for step in pipeline if type_name(step) in names), None)


def in_threads(look: Callable, items: Sequence, title: str) -> Generator:
    """Results in order. Threads suffice, because decoders release Python's lock; processes would import mmseg first."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from tqdm(pool.map(look, items), title, len(items), unit='file', leave=False, delay=1, disable=None)
        finally:
            pool.shutdown(cancel_futures=True)


def read_image(path: str) -> Image.Image:
    """Image, rotated by its EXIF tag as in mmcv. Unlike mmcv, PIL says why decoding fails."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def _exceeds_a_byte(label: Image.Image) -> bool:
    if label.mode[0] not in 'IF':
        return False
    low, high = label.getextrema()
    return low < 0 or high > 255


def abbreviated(values: Sequence) -> str:
    more = f' and {len(values) - NAMES_LISTED} more' if len(values) > NAMES_LISTED else ''
    return ', '.join(map(str, values[:NAMES_LISTED])) + more
