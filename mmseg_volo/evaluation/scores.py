"""Scores of a test set and their bootstrap intervals."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .calibration import BINS, expected_calibration_error

REPLICATES = 1000
KEPT = 4  # best and worst images in the report
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
    """An image for the report, with JPEGs of image, ground truth, prediction and errors."""

    name: str
    miou: float
    pictures: list[bytes] = field(default_factory=list)


@dataclass
class Totals:
    """Counts over images. Areas are pixel counts ``[3, n]``: intersection, ground truth and prediction of n classes."""

    confusion: np.ndarray  # [n, n], ground truth by prediction
    edges: np.ndarray  # boundary areas
    replicates: np.ndarray  # [1000, 3, n], areas of bootstrap replicates
    calibration: np.ndarray = field(default_factory=lambda: np.zeros((3, BINS), np.int64))
    images: int = 0
    worst: list[Example] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)

    @classmethod
    def of(cls, num_classes: int) -> 'Totals':
        """Totals without images."""
        confusion = np.zeros((num_classes, num_classes), np.int64)
        edges = np.zeros((3, num_classes), np.int64)
        return cls(confusion, edges, np.zeros((REPLICATES, 3, num_classes), np.int64))

    def add(self, name: str, confusion: np.ndarray, edges: np.ndarray, calibration: np.ndarray | None = None) -> None:
        """Count one image; ``calibration`` is what ``count_bins`` returns.

        Poisson bootstrap (https://research.google/pubs/pub43157): each replicate holds the image Poisson(1) times, so
        one pass is enough. The image's name seeds these numbers: results do not depend on the order or the number of
        processes, and two models tested on the same images can be compared replicate by replicate.
        """
        seed = hashlib.blake2b(name.encode(), digest_size=8).digest()
        times = np.random.default_rng(int.from_bytes(seed, 'big')).poisson(1, REPLICATES)
        self.confusion += confusion
        self.edges += edges
        self.replicates += times[:, None, None] * areas(confusion)
        self.calibration += 0 if calibration is None else calibration
        self.images += 1

    def show(self, example: Example, draw: Callable[[], list[bytes]]) -> None:
        """Keep an image, and call ``draw``, if it is among the worst or best so far."""
        self._keep([example], [example])
        if example in self.worst + self.best:
            example.pictures = draw()

    def merge(self, other: 'Totals') -> None:
        """Add the counts of another process."""
        self.confusion += other.confusion
        self.edges += other.edges
        self.replicates += other.replicates
        self.calibration += other.calibration
        self.images += other.images
        self._keep(other.worst, other.best)

    def _keep(self, worst: list[Example], best: list[Example]) -> None:
        self.worst = sorted(self.worst + worst, key=lambda example: (example.miou, example.name))[:KEPT]
        self.best = sorted(self.best + best, key=lambda example: (-example.miou, example.name))[:KEPT]

    def mean_scores(self) -> dict[str, float]:
        """Scores over all images and classes in percent, with ECE if there were probabilities."""
        scores = mean_scores(areas(self.confusion), self.edges)
        if self.calibration.any():
            scores['ECE'] = expected_calibration_error(self.calibration)
        return scores

    def bootstrap_scores(self) -> dict[str, np.ndarray]:
        """Scores of each bootstrap replicate: mIoU and aAcc ``[1000]``, IoU ``[1000, n]``."""
        per_class = iou(self.replicates)
        return dict(mIoU=mean(per_class), aAcc=accuracy(self.replicates), IoU=per_class)


def areas(confusion: np.ndarray) -> np.ndarray:
    """Areas ``[3, n]`` of a confusion matrix."""
    return np.stack([np.diag(confusion), confusion.sum(1), confusion.sum(0)])


def iou(pixels: np.ndarray) -> np.ndarray:
    """IoU ``[..., n]`` in percent from areas ``[..., 3, n]``; NaN for a class in neither truth nor prediction."""
    hit, truth, prediction = np.moveaxis(pixels, -2, 0)
    return 100 * _ratio(hit, truth + prediction - hit)


def accuracy(pixels: np.ndarray) -> np.ndarray:
    """Pixel accuracy in percent, mmseg's aAcc."""
    hit, truth, _ = np.moveaxis(pixels, -2, 0)
    return 100 * _ratio(hit.sum(-1), truth.sum(-1))


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a score."""
    return _ratio(np.nansum(scores, -1), np.isfinite(scores).sum(-1))


def class_scores(pixels: np.ndarray, edges: np.ndarray) -> dict[str, np.ndarray]:
    """Scores per class ``[n]`` in percent; NaN where the denominator is 0."""
    hit, truth, prediction = pixels
    recall = 100 * _ratio(hit, truth)
    return dict(
        IoU=iou(pixels),
        Acc=recall,  # mmseg uses both names
        Precision=100 * _ratio(hit, prediction),
        Recall=recall,
        Fscore=200 * _ratio(hit, truth + prediction),
        BoundaryIoU=iou(edges),
    )


def mean_scores(pixels: np.ndarray, edges: np.ndarray) -> dict[str, float]:
    """Scores over all classes in percent."""
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
    """IoU of Cityscapes' categories; empty for other classes. Confusion within a category is not an error."""
    groups = CITYSCAPES_CATEGORIES.values()
    if {name for group in groups for name in group} != set(classes):
        return {}
    member = np.array([[name in group for name in classes] for group in groups], np.int64)
    return dict(zip(CITYSCAPES_CATEGORIES, iou(areas(member @ confusion @ member.T)).tolist(), strict=True))


def interval(replicates: np.ndarray) -> np.ndarray:
    """95 % interval ``[2, ...]`` of replicate scores ``[1000, ...]``; NaN if no replicate has a score."""
    some = np.isfinite(replicates).any(0)
    return np.where(some, np.nanpercentile(np.where(some, replicates, 0), [2.5, 97.5], axis=0), np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.true_divide(part, whole)
