"""Inference on rasters: windows are read, and labels written, in memory that does not grow with their area."""

import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .._device import mixed_precision
from .._files import PARTIAL, file_sha256
from .._version import __version__
from ..checkpoints.download import local_file
from ..config import type_name, without_steps
from ..errors import UserError
from ..models.segmentor import window_grid
from ..rasters import Raster, RasterError, bands_in_words
from ..visualization import overlay, save_whole, with_legend
from .journal import Journal
from .label_tiff import BLOCK, circumstances_of, write_label_tiff
from .predictor import LOADERS, VOID, Predictor, Undecodable, is_odd, too_small
from .threads import in_threads

SUMS = 2**24  # bytes of added logits that are kept at least
STRIDES = 8  # columns of windows that a strip has at least, because neighbouring strips compute one or two in common
LONGEST = 2048  # side of an overlay in pixels


@dataclass
class Grid:
    """Windows of a raster, and the strips of columns that are computed one after the other.

    A strip's labels depend on all windows that cover it, also those that reach beyond it, so neighbouring strips fit
    without a seam, as if the whole width were computed at once.
    """

    height: int
    crop: list[int]
    tops: list[int]
    lefts: list[int]
    strips: list[tuple[int, int]]

    @classmethod
    def of(cls, size: tuple[int, int], crop: Sequence[int], stride: Sequence[int], classes: int) -> 'Grid':
        """The windows of ``size``, in strips that are as wide as ``SUMS`` and ``STRIDES`` say."""
        fitting, tops, lefts = window_grid(size, crop, stride)
        most = max(SUMS // (4 * classes * fitting[0]), STRIDES * stride[1])
        count = -(-size[1] // most)
        width = -(-size[1] // (count * BLOCK)) * BLOCK
        strips = [(left, min(left + width, size[1])) for left in range(0, size[1], width)]
        return cls(size[0], fitting, tops, lefts, strips)

    def blocks(self) -> list[tuple[int, int, int, int]]:
        """(top, left, height, width) of the blocks of labels, in the order in which they are computed."""
        return [
            (top, left, min(BLOCK, self.height - top), right - left)
            for left, right in self.strips
            for top in range(0, self.height, BLOCK)
        ]


class RasterRun:
    """Inference on rasters with one model.

    Args:
        paths: the rasters.
        predictor: the model.
        out: folder for results.
        save: ``'labels'`` and, for a reduced picture of them, ``'overlay'``.
        opacity: opacity of the overlay.
        bands: numbers of the bands to use, from 1; by default those of ``LoadRasterFromFile``, or all.
        resume: go on where an earlier run on the same raster was stopped.

    Raises:
        UserError: the model or its pipeline cannot be applied to windows.
    """

    def __init__(
        self,
        paths: Collection[str],
        predictor: Predictor,
        out: Path,
        save: Sequence[str],
        opacity: float,
        bands: Sequence[int] | None,
        resume: bool,
    ):
        self.paths, self.predictor, self.model, self.out = paths, predictor, predictor.model, out
        self.save, self.opacity, self.resume = save, opacity, resume
        loader = predictor.raster_loader
        self.bands = bands or (loader.bands if loader else None)
        self.fill = loader.fill if loader else 0.0
        if not predictor.segments:
            raise UserError(f'rasters need a model of type SlidingSegmentor, but this is {type(self.model).__name__}')
        channels = self.model.image_channels
        if bands and len(bands) != channels:
            raise UserError(f'--bands has {len(bands)} numbers, but the model takes {channels} channels')
        if len(predictor.classes) > VOID:
            raise UserError(f'labels of rasters have up to {VOID} classes, but the model has {len(predictor.classes)}')
        self.crop, self.stride = self._window_size()
        others = {type_name(step) for step in without_steps(predictor.steps, (*LOADERS, 'PackSegInputs'))}
        if others - {'Resize'}:
            wrong = min(others - {'Resize'})
            raise UserError(f'rasters are read in windows, so {wrong} in the test pipeline cannot be applied')
        if others:
            tqdm.write('note: rasters keep their own resolution: Resize in the test pipeline is left out')

    def _window_size(self) -> tuple[Sequence[int], Sequence[int]]:
        test_cfg, size = self.model.test_cfg, self.model.data_preprocessor.size
        if test_cfg.mode == 'slide':
            return test_cfg.crop_size, test_cfg.stride
        if size is None:
            raise UserError(
                'rasters are segmented in windows, but the config does not say how large: add --cfg-options '
                'model.test_cfg.mode=slide model.test_cfg.crop_size=(512,512) model.test_cfg.stride=(341,341)'
            )
        stride = [max(1, side * 2 // 3) for side in size]
        tqdm.write(
            f'note: rasters are segmented in windows of {size[1]} x {size[0]} pixels every {stride[1]} x {stride[0]}; '
            'model.test_cfg.mode=slide, crop_size and stride choose others'
        )
        return size, stride

    def problem(self, path: str, name: str) -> Undecodable | None:
        """Call ``segment``, and return the problem of a raster that cannot be read or does not fit the model."""
        try:
            self.segment(path, name)
        except Undecodable as problem:
            return problem
        return None

    def segment(self, path: str, name: str) -> None:
        """Write ``pred/NAME.tif`` with the georeference of the raster, and ``vis/NAME.png`` if wanted.

        Raises:
            Undecodable: the raster cannot be read, or does not fit the model.
            UserError: the results cannot be written.
        """
        target = self.out / 'pred' / f'{name}.tif'
        try:
            with Raster(path, self.bands, self.model.image_channels, self.fill) as raster:
                self._check(raster)
                circumstances = self._circumstances(raster)
                if self.resume and circumstances_of(target) == circumstances:
                    _journal_path(target).unlink(missing_ok=True)  # of a run that was killed between the two
                    tqdm.write(f'{path} was finished before')
                else:
                    self._write_labels(raster, target, circumstances)
                if 'overlay' in self.save:
                    self._write_overlay(raster, target, self.out / 'vis' / f'{name}.png')
        except RasterError as error:
            raise Undecodable(str(error)) from None

    def _check(self, raster: Raster) -> None:
        channels, count = self.model.image_channels, len(raster.bands)
        if count != channels:
            example = ' '.join(str(min(i + 1, count)) for i in range(channels))
            remedy = f'choose them with --bands, for example --bands {example}'
            if raster.has_palette:
                remedy = 'gdal_translate -expand rgb applies its colour table'
            raise Undecodable(f'{raster.path} has {bands_in_words(count)}; the model takes {channels}: {remedy}')
        if self.predictor.raster_loader is None and raster.stored not in (np.uint8, np.uint16):
            raise Undecodable(
                f'{raster.path} holds {raster.stored}, but the config loads pictures of 8 or 16 bits; '
                'LoadRasterFromFile loads other numbers'
            )
        if raster.georeference['crs'] is None:
            tqdm.write(f'note: {raster.path} has no coordinate reference system, so its labels have none')

    def _circumstances(self, raster: Raster) -> dict[str, str]:
        """What the labels depend on, by its name in messages."""
        predictor = self.predictor
        settings = [self.model.cfg.model, predictor.steps, predictor.classes, predictor.palette]
        options = dict(
            bands=raster.bands,
            windows=[*self.crop, *self.stride],
            device=torch.device(predictor.device).type,
            amp=predictor.amp,
            compile=predictor.compiled,
        )
        return {
            'the raster': _digest([file_sha256(Path(file)).encode() for file in raster.files]),
            'the checkpoint': self._weights,
            'the config': _digest([json.dumps(settings, default=str, sort_keys=True).encode()]),
            'an option': json.dumps(options),
            'a version': f'mmseg_volo {__version__}, torch {torch.__version__}',
        }

    @cached_property
    def _weights(self) -> str:
        if self.model.network is not None:
            return file_sha256(local_file(self.predictor.checkpoint))
        tensors = self.model.state_dict().values()
        return _digest(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data for tensor in tensors)

    def _write_labels(self, raster: Raster, target: Path, circumstances: dict[str, str]) -> None:
        """Compute the blocks that the journal lacks, then write all of them to ``target``."""
        grid = Grid.of((raster.height, raster.width), self.crop, self.stride, self.model.out_channels)
        blocks, pixels, name = grid.blocks(), raster.height * raster.width, Path(raster.path).name
        journal = Journal(_journal_path(target), circumstances, self.resume)
        if journal.changed:
            tqdm.write(f'warning: {raster.path} starts over: {" and ".join(journal.changed)} changed')
        done = sum(height * width for _, _, height, width in blocks[: len(journal)])
        if done:
            tqdm.write(f'{raster.path}: {done / pixels:.0%} was finished before')

        def append(block: np.ndarray) -> int:
            journal.append(zlib.compress(block.data, 1))
            return block.size

        try:
            with (
                closing(self._blocks(raster, grid, len(journal))) as computed,
                tqdm(None, name, pixels, False, initial=done, unit='px', unit_scale=True, disable=None) as bar,
                in_threads(append, computed) as appended,
            ):
                for count in appended:
                    bar.update(count)
            labels = (
                np.frombuffer(zlib.decompress(record), np.uint8).reshape(place[2:])
                for record, place in zip(journal, blocks, strict=True)
            )
            write_label_tiff(target, raster, zip(blocks, labels, strict=True), self.predictor.palette, circumstances)
        except OSError as error:
            raise UserError(f'cannot write {target} ({error.strerror}); make room and go on with --resume') from None
        except KeyboardInterrupt:
            tqdm.write(f'{raster.path}: --resume goes on after {len(journal)} of {len(blocks)} blocks')
            raise
        finally:
            journal.close()
        journal.remove()

    def _blocks(self, raster: Raster, grid: Grid, done: int) -> Generator[np.ndarray, None, None]:
        """Yield the labels of each block of ``grid.blocks()`` except the first ``done``."""
        each = -(-grid.height // BLOCK)
        for number, (left, right) in enumerate(grid.strips):
            start = BLOCK * max(0, done - number * each)
            if start < grid.height:
                yield from self._strip(raster, grid, left, right, start)

    def _strip(self, raster: Raster, grid: Grid, left: int, right: int, start: int) -> Iterator[np.ndarray]:
        """Yield the blocks of a strip of columns from row ``start`` on, computed from all windows that touch them."""
        tops = [top for top in grid.tops if top + grid.crop[0] > start]
        lefts = [x for x in grid.lefts if x < right and x + grid.crop[1] > left]
        columns = slice(left - lefts[0], right - lefts[0])
        reader = _Swaths(raster, lefts[0], lefts[-1] + grid.crop[1] - lefts[0], grid.crop[0], self._as_loaded)
        void = np.zeros((0, right - left), bool)  # of the rows that have been read but not labelled

        def swaths() -> Iterator[Tensor]:
            nonlocal void
            for swath, missing in read:
                void = np.concatenate([void, missing[:, columns]])
                yield swath

        with in_threads(reader.read, tops) as read:
            labels = np.zeros((0, right - left), np.uint8)
            begun = tops[0]  # first row of ``labels``
            rows = self.model.label_rows(swaths(), tops, [x - lefts[0] for x in lefts], grid.crop)
            for strip in self._computed(rows, raster):
                strip = strip[:, columns]
                strip[void[: len(strip)]] = VOID
                void = void[len(strip) :]
                labels = np.concatenate([labels, strip])
                if begun < start:
                    dropped = min(start - begun, len(labels))
                    labels, begun = labels[dropped:], begun + dropped
                while begun >= start and len(labels) >= min(BLOCK, grid.height - begun) > 0:
                    yield labels[:BLOCK]
                    labels, begun = labels[BLOCK:], begun + BLOCK

    def _computed(self, rows: Iterator[Tensor], raster: Raster) -> Iterator[np.ndarray]:
        """Yield ``rows``, computed in the precision that was asked for."""
        while True:
            try:
                with mixed_precision(self.predictor.device, self.predictor.amp):
                    strip = next(rows, None)
            except RuntimeError:
                if not is_odd(raster.height, raster.width):
                    raise
                raise too_small(raster.path, raster.height, raster.width) from None
            if strip is None:
                return
            yield strip.numpy()

    def _as_loaded(self, values: np.ndarray) -> np.ndarray:
        """Values as the pipeline's loader gives them: pictures in 8 bits and as BGR."""
        if self.predictor.raster_loader is not None:
            return values
        if values.dtype != np.uint8:
            height, width = values.shape[1:]
            deep = values.astype(np.uint16).reshape(-1, width)
            values = cv2.convertScaleAbs(deep, alpha=1 / 257).reshape(-1, height, width)
        return values[::-1]

    def _write_overlay(self, raster: Raster, target: Path, path: Path) -> None:
        scale = min(1.0, LONGEST / max(raster.height, raster.width))
        height, width = (max(1, round(side * scale)) for side in (raster.height, raster.width))
        with Raster(str(target)) as labels:
            [label] = labels.reduced(width, height)
        page = overlay(raster.picture(width, height), label, self.predictor.palette, self.opacity)
        save_whole(with_legend(page, label, self.predictor.classes, self.predictor.palette), path)


class _Swaths:
    """Reads the rows that a row of windows covers, from top to bottom, each row of the file once."""

    def __init__(
        self, raster: Raster, left: int, width: int, height: int, as_loaded: Callable[[np.ndarray], np.ndarray]
    ):
        self.raster, self.left, self.width, self.height, self.as_loaded = raster, left, width, height, as_loaded
        self.top, self.kept = 0, np.zeros((0, 0, 0))

    def read(self, top: int) -> tuple[Tensor, np.ndarray]:
        """``[C, height, width]`` from row ``top`` on, and which pixels of the rows not read before are void."""
        kept = self.kept[:, top - self.top :]
        new = self.height - kept.shape[1]
        values, void = self.raster.read(top + self.height - new, self.left, new, self.width)
        values = self.as_loaded(values)
        if kept.size:
            values = np.concatenate([kept, values], axis=1)
        self.top, self.kept = top, values
        missing = np.zeros((new, self.width), bool) if void is None else void
        return torch.from_numpy(np.ascontiguousarray(values)), missing


def _journal_path(target: Path) -> Path:
    return target.with_name(f'{PARTIAL}{target.name}.journal')


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
