"""Segmentors that test images of any size in memory that does not grow with their area."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.structures import PixelData
from mmseg.models import CascadeEncoderDecoder, EncoderDecoder, SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..errors import UserError
from .backbone import Backbone, are_positive
from .confidence import labels_and_confidence, most_probable

ROWS = 64  # rows of the label map that are computed at a time
WINDOWS_ON_A_GPU, WINDOWS_ON_A_CPU = 8, 1  # per batch; one window keeps a CPU busy


@MODELS.register_module()
class SlidingSegmentor(EncoderDecoder):
    """mmseg's ``EncoderDecoder``, tested in batches of windows and rows of logits.

    The windows are those of mmseg's ``slide_inference``. Each is normalised on its own, and rows become labels as soon
    as no further window covers them, so that the normalised image and its logits never exist as a whole.

    ``test_cfg`` takes these keys besides mmseg's ``mode``, ``crop_size`` and ``stride``:

    - ``batch_size``: number of windows per batch, or of whole images; 8 on a GPU and 1 on a CPU by default; halved when
      memory runs out.
    - ``weighting``: weights for averaging overlapping windows: ``'uniform'`` as in mmseg, or ``'hann'``, which prefers
      the middle of a window to its border and leaves no seams.
    - ``logits``: also return ``seg_logits``, float32 ``[classes, H, W]``, with each prediction.
    - ``confidence``: also return ``confidence``, the probability of each label in 1/65535, uint16 ``[1, H, W]``.
    """

    def __init__(self, *args, test_cfg: dict, data_preprocessor: dict, **kwargs):
        super().__init__(*args, test_cfg=test_cfg, data_preprocessor=data_preprocessor, **kwargs)
        if not isinstance(self.test_cfg, Mapping):
            raise UserError(f'test_cfg must be a dict, got {self.test_cfg!r}')
        weighting = self.test_cfg.get('weighting', 'uniform')
        if weighting not in ('uniform', 'hann'):
            raise UserError(f"test_cfg.weighting must be 'uniform' or 'hann', got {weighting!r}")
        if self.test_cfg.get('mode') == 'slide':
            crop, stride = (self.test_cfg.get(key, ()) for key in ('crop_size', 'stride'))
            sizes = are_positive(crop, 2) and are_positive(stride, 2)
            if not sizes or any(s > c for s, c in zip(stride, crop, strict=True)):
                raise UserError(f'test_cfg.stride must be between (1, 1) and crop_size {crop!r}, got {stride!r}')
        if self.data_preprocessor.test_cfg:
            raise UserError('data_preprocessor.test_cfg must be removed: it pads images, and VOLO pads them itself')
        self.window_batch = self.test_cfg.get('batch_size')
        means, taken = self.image_channels, getattr(self.backbone, 'in_channels', None)
        if isinstance(self.backbone, Backbone) and means != taken:
            raise UserError(f'data_preprocessor.mean has {means} values, but backbone.in_channels is {taken}')

    @property
    def image_channels(self) -> int:
        """Number of channels of the images that this model takes."""
        means = len(getattr(self.data_preprocessor, 'mean', ()))
        if means > 1:
            return means
        return self.backbone.in_channels if isinstance(self.backbone, Backbone) else 3

    @torch.no_grad()
    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict the labels of images packed by the data pipeline."""
        samples = data['data_samples']
        logits, confidence = (self.test_cfg.get(key, False) for key in ('logits', 'confidence'))
        for image, sample in zip(data['inputs'], samples, strict=True):
            size = sample.ori_shape
            [result] = self.segment_all([image], size, logits, confidence)
            if logits:
                sample.set_data(dict(seg_logits=PixelData(data=_turned_back(result, sample))))
                result = label_map(self, result.split(ROWS, 1), size, confidence)
            maps = zip(('pred_sem_seg', 'confidence'), result if confidence else [result], strict=False)
            sample.set_data({key: PixelData(data=_turned_back(values, sample)[None]) for key, values in maps})
        return samples

    val_step = test_step

    def segment(self, image: Tensor, size: tuple[int, int], logits: bool = False) -> Tensor:
        """Compute labels ``[H, W]``, uint8 for up to 256 classes, or logits, float32 ``[classes, H, W]``, of one image.

        The result is on the CPU.

        Args:
            image: uint8 or float32 ``[C, h, w]``, in the channel order that ``data_preprocessor`` takes, on any device.
            size: (H, W) of the result; logits are resized to it as in mmseg, some rows at a time.
        """
        [result] = self.segment_all([image], size, logits)
        return result

    @torch.no_grad()
    def segment_all(
        self, images: Sequence[Tensor], size: tuple[int, int], logits: bool = False, confidence: bool = False
    ) -> Iterator[Any]:
        """Yield the results of ``segment`` for images of one size, whose windows share batches.

        Without ``logits``, ``confidence`` yields pairs of the labels and their probabilities in 1/65535, uint16
        ``[H, W]``.
        """
        height, width = images[0].shape[-2:]
        crop, places = self._places(height, width)
        crops = (image[:, y : y + crop[0], x : x + crop[1]] for image in images for y, x in places)
        windows = self._batches(crops)
        for _ in images:
            slides = self.test_cfg.mode == 'slide'
            strips = self._averaged(windows, places, crop, width) if slides else iter([next(windows)])
            rows = _resized(strips, (height, width), tuple(size), self.align_corners)
            if logits:
                yield torch.cat([row.float().cpu() for row in rows], dim=1)
            else:
                yield label_map(self, rows, size, confidence)

    @torch.no_grad()
    def label_rows(
        self, swaths: Iterable[Tensor], tops: Sequence[int], lefts: Sequence[int], crop: Sequence[int]
    ) -> Iterator[Tensor]:
        """Yield labels ``[n, W]`` on the CPU, from top to bottom, of an image that is never in memory as a whole.

        With one window per batch they equal those of ``segment``, bit for bit. Batches do not cross rows of windows.

        Args:
            swaths: for each of ``tops`` the image's rows that these windows cover, ``[C, crop height, W]``.
            tops: first row of each row of windows, ascending; the labels begin with the first of these rows.
            lefts: first column of each window in a row of windows, ascending from 0; the last ends at W.
            crop: (height, width) of the windows.
        """
        windows = (logits for swath in swaths for logits in self._batches(swath[:, :, x : x + crop[1]] for x in lefts))
        places = ((y - tops[0], x) for y, x in product(tops, lefts))
        for rows in self._averaged(windows, places, crop, lefts[-1] + crop[1]):
            yield label_map(self, [rows], (rows.shape[1], lefts[-1] + crop[1]))

    def images_per_batch(self, height: int, width: int) -> int:
        """Number of images of this size whose windows fill a batch."""
        return max(1, self._window_batch() // len(self._places(height, width)[1]))

    def _places(self, height: int, width: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Size of the windows, and the first row and column of each; a single one in whole mode."""
        if self.test_cfg.mode != 'slide':
            return [height, width], [(0, 0)]
        crop, tops, lefts = window_grid((height, width), self.test_cfg.crop_size, self.test_cfg.stride)
        return crop, list(product(tops, lefts))

    def _logits(self, images: list[Tensor]) -> Tensor:
        inputs = self.data_preprocessor(dict(inputs=images))['inputs']
        return self.encode_decode(inputs, [dict(img_shape=inputs.shape[-2:])] * len(inputs))

    def _averaged(
        self, windows: Iterator[Tensor], places: Iterable[tuple[int, int]], crop: Sequence[int], width: int
    ) -> Iterator[Tensor]:
        """Yield the averaged logits ``[classes, n, w]`` of one image from top to bottom, n rows at a time."""
        weight = self._weight(crop)
        sums: Any = None  # over the windows so far, for the rows from ``top`` on
        weights: Any = None
        top = 0
        for (y, x), logits in zip(places, windows, strict=False):  # the next image's windows follow
            if sums is None:
                sums = logits.new_zeros(len(logits), crop[0], width, dtype=torch.float32)
                weights = torch.zeros_like(sums[:1])
                weight = weight.to(sums)
            if y > top:  # nothing below covers the rows above y
                done = y - top
                for rows, total in zip(sums[:, :done].split(ROWS, 1), weights[:, :done].split(ROWS, 1), strict=True):
                    yield rows / total
                kept = crop[0] - done
                for buffer in (sums, weights):
                    buffer[:, :kept] = buffer[:, done:] if kept <= done else buffer[:, done:].clone()
                    buffer[:, kept:] = 0
                top = y
            sums[:, :, x : x + crop[1]] += logits * weight
            weights[:, :, x : x + crop[1]] += weight
        for rows, total in zip(sums.split(ROWS, 1), weights.split(ROWS, 1), strict=True):
            yield rows / total

    def _batches(self, crops: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the logits of each window, computed in batches that are halved when device memory runs out."""
        crops = iter(crops)
        waiting: list[Tensor] = []
        while True:
            waiting += islice(crops, max(0, self._window_batch() - len(waiting)))
            batch = waiting[: self._window_batch()]
            if not batch:
                return
            try:
                logits = self._logits(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.window_batch = len(batch) // 2
                MMLogger.get_current_instance().warning(
                    f'out of device memory: the batch size is now {self.window_batch} windows'
                )
                torch.cuda.empty_cache()
                continue
            yield from logits
            del waiting[: len(batch)]

    def _window_batch(self) -> int:
        if self.window_batch is None:
            on_gpu = self.data_preprocessor.device.type == 'cuda'
            self.window_batch = WINDOWS_ON_A_GPU if on_gpu else WINDOWS_ON_A_CPU
        return self.window_batch

    def _weight(self, crop: Sequence[int]) -> Tensor:
        if self.test_cfg.get('weighting', 'uniform') == 'uniform':
            return torch.ones(crop)
        rows, columns = (
            torch.hann_window(side + 2, periodic=False)[1:-1] for side in crop
        )  # without the zeros at its ends
        return rows[:, None] * columns


@MODELS.register_module()
class SlidingCascadeSegmentor(SlidingSegmentor, CascadeEncoderDecoder):
    """mmseg's ``CascadeEncoderDecoder`` (OCRNet, for example), tested as ``SlidingSegmentor`` is."""


def label_map(model: EncoderDecoder, rows: Iterable[Tensor], size: tuple[int, int], confidence: bool = False) -> Any:
    """Labels ``[H, W]`` on the CPU, uint8 for up to 256 classes, and if wanted their probabilities in 1/65535, uint16.

    Args:
        rows: logits of ``model`` from top to bottom, ``[classes, n, W]`` each.
    """
    labels = torch.empty(size, dtype=torch.uint8 if model.out_channels <= 256 else torch.int64)
    sure = torch.empty(size if confidence else 0, dtype=torch.uint16)
    threshold = last_head(model).threshold if model.out_channels == 1 else None
    top = 0
    for row in rows:
        part = slice(top, top + row.shape[1])
        if confidence:
            labels[part], sure[part] = labels_and_confidence(row, threshold)
        else:
            labels[part] = best_class(row) if threshold is None else row[0].sigmoid() > threshold
        top = part.stop
    return (labels, sure) if confidence else labels


def best_class(logits: Tensor) -> Tensor:
    """Index of the largest of ``logits`` ``[classes, H, W]`` per pixel, int64 ``[H, W]``; the first of equal ones."""
    return logits.max(0).indices  # on a CPU argmax(0) takes ten times as long (torch 2.11)


def compile_backbone(model: Any) -> None:
    """Compile the backbone in place with ``torch.compile``, once per size; its parameters keep their names.

    After 8 sizes torch runs further ones uncompiled.
    """
    model.backbone.compile(dynamic=False)  # Inductor fails with symbolic sizes on a CPU (torch 2.11)


def last_head(model: EncoderDecoder) -> Any:
    """The decode head whose logits are the result, in a cascade the last one."""
    return model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head


@MODELS.register_module()
class SlidingTTAModel(SegTTAModel):
    """mmseg's average over scales and flips, some rows at a time; it also returns ``confidence``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.module.test_cfg.logits = True

    def merge_preds(self, data_samples_list: list[list[SegDataSample]]) -> list[SegDataSample]:
        """Average the probabilities of each image, which has one sample per scale and flip."""
        return [self._merged(samples) for samples in data_samples_list]

    def _merged(self, samples: list[SegDataSample]) -> SegDataSample:
        binary = self.module.out_channels == 1
        logits = [sample.seg_logits.data for sample in samples]
        labels = torch.empty(1, *logits[0].shape[1:], dtype=torch.int64)
        confidence = torch.empty(labels.shape, dtype=torch.uint16)
        for top in range(0, labels.shape[1], ROWS):
            rows = slice(top, top + ROWS)
            prob = sum(part[:, rows].sigmoid() if binary else part[:, rows].softmax(0) for part in logits)
            prob = prob / len(logits)
            labels[:, rows], confidence[:, rows] = most_probable(prob, last_head(self.module).threshold)
        merged = samples[0]
        del merged.seg_logits
        merged.set_data(dict(pred_sem_seg=PixelData(data=labels), confidence=PixelData(data=confidence)))
        return merged


def _turned_back(result: Tensor, sample: SegDataSample) -> Tensor:
    """Undo the flip of test-time augmentation."""
    if not sample.metainfo.get('flip'):
        return result
    values = result.view(torch.int16) if result.dtype == torch.uint16 else result  # which torch 2.11 cannot flip
    return values.flip(-1 if sample.flip_direction == 'horizontal' else -2).view(result.dtype)


def window_grid(
    size: Sequence[int], crop: Sequence[int], stride: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """(height, width) of the windows, at most ``size``, then the first row of each, and the first column of each."""
    fitting = [min(side, length) for side, length in zip(crop, size, strict=True)]
    tops, lefts = (_starts(*args) for args in zip(size, fitting, stride, strict=True))
    return fitting, tops, lefts


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """First row or column of each window; as in mmseg, the last window ends with the image."""
    steps = max(length - crop + stride - 1, 0) // stride
    return [min(step * stride, length - crop) for step in range(steps + 1)]


def _resized(
    strips: Iterator[Tensor], size: tuple[int, ...], out: tuple[int, ...], align_corners: bool
) -> Iterator[Tensor]:
    """Resize a map of ``size``, given as strips ``[C, n, w]``, bilinearly to strips of a map of ``out``.

    Each row of the result needs two neighbouring rows of the map and no others.
    """
    if size == out:
        for strip in strips:
            yield from strip.split(ROWS, 1)
        return
    above, below, fraction = _neighbours(size[0], out[0], align_corners)
    top = done = 0
    kept: Tensor | None = None  # rows from ``top`` on
    for strip in strips:
        kept = strip if kept is None else torch.cat([kept, strip], 1)
        ready = int(torch.searchsorted(below, top + kept.shape[1]))  # rows of ``out`` whose neighbours are all here
        for first in range(done, ready, ROWS):
            rows = slice(first, min(first + ROWS, ready))
            upper, lower = (kept[:, (index[rows] - top).to(kept.device)].float() for index in (above, below))
            mixed = torch.lerp(upper, lower, fraction[rows, None].to(kept.device))
            yield F.interpolate(mixed[None], (mixed.shape[1], out[1]), mode='bilinear', align_corners=align_corners)[0]
        done = ready
        if done < out[0]:
            passed = min(int(above[done]) - top, kept.shape[1])
            kept, top = kept[:, passed:], top + passed


def _neighbours(length: int, out: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of ``out``: the rows above and below it among ``length`` rows, and its way from the upper one."""
    rows = torch.arange(out, dtype=torch.float64)
    if align_corners:
        position = rows * (length - 1) / max(out - 1, 1)
    else:
        position = ((rows + 0.5) * length / out - 0.5).clamp(min=0)
    above = position.floor().long().clamp(max=length - 1)
    return above, (above + 1).clamp(max=length - 1), (position - above).float()
