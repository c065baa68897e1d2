"""What a test set says about a model, and how sure one can be."""

import csv
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmengine.dist import get_rank, get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.evaluation import CityscapesMetric
from mmseg.registry import METRICS
from PIL import Image
from prettytable import PrettyTable

from ..errors import UserError
from ..files import whole
from ..pictures import overlay

REPLICATES = 1000
DILATION = 0.02  # of the diagonal: the width of a boundary in the paper
KEPT, WIDTH = 4, 640  # pictured images on either end of the scale, and their width at most
CITYSCAPES_CATEGORIES = {
    'flat': ('road', 'sidewalk'),
    'construction': ('building', 'wall', 'fence'),
    'object': ('pole', 'traffic light', 'traffic sign'),
    'nature': ('vegetation', 'terrain'),
    'sky': ('sky',),
    'human': ('person', 'rider'),
    'vehicle': ('car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle'),
}


@dataclass(eq=False)
class Example:
    """An image worth looking at, with JPEGs of itself, truth, prediction and errors."""

    name: str
    miou: float
    pictures: list[bytes] = field(default_factory=list)


@dataclass
class Totals:
    """What images add up to. Areas are pixels ``[3, n]``: hit, truth and prediction of n classes."""

    confusion: np.ndarray  # [n, n], truth by prediction
    edges: np.ndarray  # areas of the boundaries
    replicates: np.ndarray  # areas of 1000 test sets, drawn with replacement from this one
    images: int = 0
    worst: list[Example] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)

    @classmethod
    def of(cls, num_classes: int) -> 'Totals':
        """Nothing yet."""
        shapes = (num_classes, num_classes), (3, num_classes), (REPLICATES, 3, num_classes)
        return cls(*(np.zeros(shape, np.int64) for shape in shapes))

    def add(self, name: str, confusion: np.ndarray, edges: np.ndarray) -> None:
        """Count one image.

        Poisson bootstrap (https://research.google/pubs/pub43157): each replicate holds the image Poisson(1) times, so
        that one pass does. The image's name draws how often, so that neither order nor number of processes matters, and
        two models measured on the same images can be compared replicate by replicate.
        """
        seed = hashlib.blake2b(name.encode(), digest_size=8).digest()
        times = np.random.default_rng(int.from_bytes(seed, 'big')).poisson(1, REPLICATES)
        self.confusion += confusion
        self.edges += edges
        self.replicates += times[:, None, None] * areas(confusion)
        self.images += 1

    def show(self, example: Example, draw: Callable[[], list[bytes]]) -> None:
        """Draw and keep an image that is among the worst or the best so far."""
        self._keep([example], [example])
        if example in self.worst + self.best:
            example.pictures = draw()

    def merge(self, other: 'Totals') -> None:
        """Add what another process counted."""
        self.confusion += other.confusion
        self.edges += other.edges
        self.replicates += other.replicates
        self.images += other.images
        self._keep(other.worst, other.best)

    def _keep(self, worst: list[Example], best: list[Example]) -> None:
        self.worst = sorted(self.worst + worst, key=lambda example: (example.miou, example.name))[:KEPT]
        self.best = sorted(self.best + best, key=lambda example: (-example.miou, example.name))[:KEPT]

    def draws(self) -> dict[str, np.ndarray]:
        """Scores of the replicates: mIoU and aAcc ``[1000]``, IoU ``[1000, n]``."""
        per_class = iou(self.replicates)
        return dict(mIoU=mean(per_class), aAcc=accuracy(self.replicates), IoU=per_class)


def areas(confusion: np.ndarray) -> np.ndarray:
    """Areas ``[3, n]`` of a confusion matrix."""
    return np.stack([np.diag(confusion), confusion.sum(1), confusion.sum(0)])


def iou(pixels: np.ndarray) -> np.ndarray:
    """IoU ``[..., n]`` in per cent, from areas ``[..., 3, n]``; NaN for a class in neither truth nor prediction."""
    hit, truth, prediction = np.moveaxis(pixels, -2, 0)
    return 100 * _ratio(hit, truth + prediction - hit)


def accuracy(pixels: np.ndarray) -> np.ndarray:
    """Per cent of all pixels that are right, mmseg's aAcc."""
    hit, truth, _ = np.moveaxis(pixels, -2, 0)
    return 100 * _ratio(hit.sum(-1), truth.sum(-1))


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a score."""
    return _ratio(np.nansum(scores, -1), np.isfinite(scores).sum(-1))


def class_scores(pixels: np.ndarray, edges: np.ndarray) -> dict[str, np.ndarray]:
    """Each score ``[n]`` in per cent; NaN where there is nothing to divide by."""
    hit, truth, prediction = pixels
    recall = 100 * _ratio(hit, truth)
    return dict(
        IoU=iou(pixels),
        Acc=recall,  # mmseg has both names, too
        Precision=100 * _ratio(hit, prediction),
        Recall=recall,
        Fscore=200 * _ratio(hit, truth + prediction),
        BoundaryIoU=iou(edges),
    )


def mean_scores(pixels: np.ndarray, edges: np.ndarray) -> dict[str, float]:
    """Each score of the whole, in per cent."""
    per_class = class_scores(pixels, edges)
    truth = pixels[1]
    scores = dict(
        mIoU=mean(per_class['IoU']),
        mAcc=mean(per_class['Acc']),
        aAcc=accuracy(pixels),
        fwIoU=_ratio(np.nansum(per_class['IoU'] * truth), truth.sum()),
        mBoundaryIoU=mean(per_class['BoundaryIoU']),
    )
    return {name: float(score) for name, score in scores.items()}


def category_iou(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """IoU of Cityscapes' categories, if ``classes`` are its own; a mistake within a category is none."""
    groups = CITYSCAPES_CATEGORIES.values()
    if {name for group in groups for name in group} != set(classes):
        return {}
    member = np.array([[name in group for name in classes] for group in groups], np.int64)
    return dict(zip(CITYSCAPES_CATEGORIES, iou(areas(member @ confusion @ member.T)).tolist(), strict=True))


def interval(draws: np.ndarray) -> np.ndarray:
    """Where 95 % of the replicates ``[1000, ...]`` lie, from and to: ``[2, ...]``; NaN if none has a score."""
    some = np.isfinite(draws).any(0)
    return np.where(some, np.nanpercentile(np.where(some, draws, 0), [2.5, 97.5], axis=0), np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.true_divide(part, whole)


@METRICS.register_module()
class SegmentationMetric(BaseMetric):
    """IoU and its kin per class and per image, with 95 % intervals, in memory that does not grow with the test set.

    ``totals`` holds the sums after ``evaluate``, in the main process. ``docs/measuring.md`` defines every score.

    Args:
        out_dir: gets ``per_image.csv``, a row per image; one folder for all processes.
        root: images are named relative to it.
        ignore_index: of void pixels, which count nowhere.
    """

    default_prefix = ''  # names as IoUMetric has them

    def __init__(self, out_dir: str, root: str, ignore_index: int = 255):
        super().__init__(collect_dir=os.path.join(out_dir, '.parts'))
        self.out_dir, self.root, self.ignore_index = Path(out_dir), root, ignore_index
        self.totals: Totals | None = None
        self._rows(get_rank()).unlink(missing_ok=True)  # of a run that was killed

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the images of a batch."""
        classes = self.dataset_meta['classes']
        if not self.results:  # mmengine gathers and empties it; one entry per process
            self.results.append(Totals.of(len(classes)))
        totals = self.results[0]
        with self._rows(get_rank()).open('a', newline='') as file:
            writer = csv.writer(file)
            for sample in data_samples:
                name = os.path.relpath(sample['img_path'], self.root)
                truth, prediction = self._maps(sample)
                confusion, edges = _count(truth, prediction, len(classes))
                pixels = areas(confusion)
                scores = mean_scores(pixels, edges)
                values = [scores['mIoU'], scores['aAcc'], scores['mBoundaryIoU'], *iou(pixels)]
                cells = ['' if np.isnan(value) else f'{value:.4f}' for value in values]
                writer.writerow([name, pixels[1].sum(), *cells])
                totals.add(name, confusion, edges)
                if pixels.any():
                    draw = partial(_draw, sample['img_path'], truth, prediction, self.dataset_meta['palette'])
                    totals.show(Example(name, scores['mIoU']), draw)

    def compute_metrics(self, results: list[Totals]) -> dict[str, float]:
        """Scores of all images together."""
        totals, *others = results
        for other in others:
            totals.merge(other)
        classes = self.dataset_meta['classes']
        pixels = areas(totals.confusion)
        if not pixels.any():
            raise UserError(f'every pixel of the test set is void ({self.ignore_index}): nothing can be measured')
        self._join_rows(classes)
        self.totals = totals
        draws = totals.draws()

        table = PrettyTable(['class', 'IoU', '95 % interval', 'Acc', 'Precision', 'Fscore', 'BoundaryIoU'])
        table.align = 'r'
        table.align['class'] = 'l'
        scores = class_scores(pixels, totals.edges)
        for i, (name, (low, high)) in enumerate(zip(classes, interval(draws['IoU']).T, strict=True)):
            values = [f'{scores[key][i]:.2f}' for key in table.field_names if key in scores]
            table.add_row([name, values[0], f'{low:.2f} to {high:.2f}', *values[1:]])
        print_log(f'per class, in per cent:\n{table}', 'current')
        return mean_scores(pixels, totals.edges)

    def _maps(self, sample: dict) -> tuple[np.ndarray, np.ndarray]:
        """Truth and prediction, uint8 ``[H, W]``, with the number after the last class wherever truth is void."""
        if 'gt_sem_seg' not in sample:
            raise UserError(
                'test_pipeline loads no labels, so nothing can be measured; give it LoadAnnotations, '
                'or use --format, which needs no labels'
            )
        truth, prediction = (
            sample[key]['data'].squeeze(0).cpu().numpy().astype(np.uint8) for key in ('gt_sem_seg', 'pred_sem_seg')
        )
        label = sample['seg_map_path']
        if truth.shape != prediction.shape:
            sizes = [f'{width} x {height}' for height, width in (truth.shape, prediction.shape)]
            raise UserError(
                f'label {label} is {sizes[0]}, but the prediction for {sample["img_path"]} is {sizes[1]}; '
                'tools/check_data.py names all labels whose size is not that of their image'
            )
        void = len(self.dataset_meta['classes'])
        ignored = truth == self.ignore_index
        foreign = truth[~ignored & (truth >= void)]
        if foreign.size:
            raise UserError(
                f'label {label} has id {foreign[0]}, but there are {void} classes (0 to {void - 1}) and '
                f'{self.ignore_index} for void; tools/check_data.py names all such labels'
            )
        truth[ignored] = prediction[ignored] = void
        return truth, prediction

    def _rows(self, rank: int) -> Path:
        return self.out_dir / f'.per_image.{rank}.csv'

    def _join_rows(self, classes: Sequence[str]) -> None:
        """Make one file of those of all processes, which took turns in the order of the data set."""
        parts = [path for path in map(self._rows, range(get_world_size())) if path.exists()]
        with whole(self.out_dir / 'per_image.csv') as unfinished, ExitStack() as stack:
            writer = csv.writer(stack.enter_context(unfinished.open('w', newline='')))
            writer.writerow(['image', 'pixels', 'mIoU', 'aAcc', 'mBoundaryIoU', *(f'IoU {name}' for name in classes)])
            readers = [csv.reader(stack.enter_context(path.open(newline=''))) for path in parts]
            writer.writerows(row for turn in zip_longest(*readers) for row in turn if row)
        for path in parts:
            path.unlink()


@METRICS.register_module()
class CityscapesLabelIds(CityscapesMetric):
    """mmseg's ``CityscapesMetric`` for label maps of bytes: its table of ids has a -1, which they cannot hold."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Write the labelIds of a batch."""
        for sample in data_samples:
            sample['pred_sem_seg']['data'] = sample['pred_sem_seg']['data'].long()
        super().process(data_batch, data_samples)


def _count(truth: np.ndarray, prediction: np.ndarray, void: int) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrix ``[void, void]`` of an image, and areas of the boundaries (Boundary IoU, arXiv 2103.16562)."""
    pairs = np.bincount(truth.ravel() * np.int64(void + 1) + prediction.ravel(), minlength=(void + 1) ** 2)
    confusion = pairs.reshape(void + 1, void + 1)[:void, :void]
    outlines = [_outlines(label, void) for label in (truth, prediction)]
    both = np.where(outlines[0] == outlines[1], outlines[0], void)
    edges = np.stack([np.bincount(label.ravel(), minlength=void + 1)[:void] for label in (both, *outlines)])
    return confusion, edges


def _outlines(label: np.ndarray, void: int) -> np.ndarray:
    """The label map near the boundaries of its classes, and void elsewhere; outside of the image all is void."""
    reach = max(1, round(DILATION * float(np.hypot(*label.shape))))
    padded = cv2.copyMakeBorder(label, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=void)
    # A pixel is inside, for whichever class, where the window around it holds one number: one pass for all classes.
    low, high = (turn(padded, np.ones((3, 3), np.uint8), iterations=reach) for turn in (cv2.erode, cv2.dilate))
    return np.where((low != high)[1:-1, 1:-1], label, void)


def _draw(path: str, truth: np.ndarray, prediction: np.ndarray, palette: Sequence) -> list[bytes]:
    """JPEGs of image, truth, prediction and errors: red is wrong, black is void."""
    height, width = truth.shape
    size = min(width, WIDTH), max(1, height * min(width, WIDTH) // width)
    image = Image.fromarray(mmcv.imread(path, channel_order='rgb')).resize(size)
    truth, prediction = (
        np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST)) for label in (truth, prediction)
    )
    colour, grey = np.asarray(image), np.asarray(image.convert('L').convert('RGB'))
    void = truth == len(palette)
    errors = np.select([void, truth != prediction], [1, 0], default=2)
    pictures = [
        image,
        overlay(colour, truth, palette),
        overlay(colour, prediction, palette),
        overlay(grey, errors, [(230, 0, 0), (0, 0, 0)], opacity=0.75),
    ]
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format='JPEG', quality=85)
        encoded.append(buffer.getvalue())
    return encoded
