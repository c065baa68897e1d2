"""mmengine metrics: the scores of a test set, and label maps for Cityscapes' server."""

import csv
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np
from mmengine.dist import get_rank, get_world_size
from mmengine.evaluator import BaseMetric
from mmseg.evaluation import CityscapesMetric
from mmseg.registry import METRICS
from PIL import Image

from .._files import whole
from ..errors import UserError
from ..rasters import read_rgb
from ..visualization import jpeg, overlay
from .calibration import count_bins
from .scores import Example, Totals, areas, iou, mean_scores

DILATION = 0.02  # of the image diagonal: the boundary width of the Boundary IoU paper
WIDTH = 640  # maximum of a picture in the report


@METRICS.register_module()
class SegmentationMetric(BaseMetric):
    """IoU and related scores per class and image, with 95 % intervals, in memory independent of the test set's size.

    After ``evaluate``, ``totals`` holds the counts in the main process. ``docs/measuring.md`` defines every score.

    Args:
        out_dir: folder for ``per_image.csv``, one row per image; the same for all processes.
        root: folder that image names are relative to.
        ignore_index: label of void pixels, which are not counted.
    """

    default_prefix = ''  # same names as IoUMetric

    def __init__(self, out_dir: str, root: str, ignore_index: int = 255):
        super().__init__(collect_dir=os.path.join(out_dir, '.parts'))
        self.out_dir, self.root, self.ignore_index = Path(out_dir), root, ignore_index
        self.totals: Totals | None = None
        self._rows(get_rank()).unlink(missing_ok=True)  # left by a killed run

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the images of a batch."""
        classes = self.dataset_meta['classes']
        if not self.results:  # mmengine gathers and clears this list; one entry per process
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
                totals.add(name, confusion, edges, _calibration(sample, truth, prediction, void=len(classes)))
                if pixels.any():
                    draw = partial(_draw, sample['img_path'], truth, prediction, self.dataset_meta['palette'])
                    totals.show(Example(name, scores['mIoU']), draw)

    def compute_metrics(self, results: list[Totals]) -> dict[str, float]:
        """Scores over all images."""
        totals, *others = results
        for other in others:
            totals.merge(other)
        classes = self.dataset_meta['classes']
        pixels = areas(totals.confusion)
        if not pixels.any():
            raise UserError(f'every pixel of the test set is void ({self.ignore_index}), so no score can be computed')
        self._join_rows(classes)
        self.totals = totals
        return totals.mean_scores()

    def _maps(self, sample: dict) -> tuple[np.ndarray, np.ndarray]:
        """Ground truth and prediction, uint8 ``[H, W]``; both equal the number of classes where the truth is void."""
        if 'gt_sem_seg' not in sample:
            raise UserError(
                'test_pipeline loads no labels, so no score can be computed; add LoadAnnotations, '
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
                'mmseg-volo check-data lists all labels that differ in size from their image'
            )
        void = len(self.dataset_meta['classes'])
        ignored = truth == self.ignore_index
        foreign = truth[~ignored & (truth >= void)]
        if foreign.size:
            raise UserError(
                f'label {label} has id {foreign[0]}, but there are {void} classes (0 to {void - 1}) and '
                f'{self.ignore_index} for void; mmseg-volo check-data lists all such labels'
            )
        truth[ignored] = prediction[ignored] = void
        return truth, prediction

    def _rows(self, rank: int) -> Path:
        return self.out_dir / f'.per_image.{rank}.csv'

    def _join_rows(self, classes: Sequence[str]) -> None:
        """Merge the rows of all processes; the images alternate between processes in the order of the data set."""
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
    """mmseg's ``CityscapesMetric`` for uint8 label maps, which cannot hold the -1 in its table of ids."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Write the labelIds of a batch."""
        for sample in data_samples:
            sample['pred_sem_seg']['data'] = sample['pred_sem_seg']['data'].long()
        super().process(data_batch, data_samples)


def _calibration(sample: dict, truth: np.ndarray, prediction: np.ndarray, void: int) -> np.ndarray | None:
    """Counts per bin of confidence, or None if the model does not say how sure it is."""
    if 'confidence' not in sample:
        return None
    confidence = sample['confidence']['data'].squeeze(0).cpu().numpy()
    return count_bins(confidence, truth == prediction, truth != void)


def _count(truth: np.ndarray, prediction: np.ndarray, void: int) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrix ``[void, void]`` and boundary areas ``[3, void]`` (Boundary IoU, arXiv 2103.16562)."""
    pairs = np.bincount(truth.ravel() * np.int64(void + 1) + prediction.ravel(), minlength=(void + 1) ** 2)
    confusion = pairs.reshape(void + 1, void + 1)[:void, :void]
    outlines = [_outlines(label, void) for label in (truth, prediction)]
    both = np.where(outlines[0] == outlines[1], outlines[0], void)
    edges = np.stack([np.bincount(label.ravel(), minlength=void + 1)[:void] for label in (both, *outlines)])
    return confusion, edges


def _outlines(label: np.ndarray, void: int) -> np.ndarray:
    """The label map near class boundaries, and void elsewhere. Pixels outside the image count as void."""
    reach = max(1, round(DILATION * float(np.hypot(*label.shape))))
    padded = cv2.copyMakeBorder(label, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=void)
    # A pixel is interior if its window holds a single label, whatever the class: one pass for all classes.
    low, high = (turn(padded, np.ones((3, 3), np.uint8), iterations=reach) for turn in (cv2.erode, cv2.dilate))
    return np.where((low != high)[1:-1, 1:-1], label, void)


def _draw(path: str, truth: np.ndarray, prediction: np.ndarray, palette: Sequence) -> list[bytes]:
    """JPEGs of image, ground truth, prediction and errors (red: wrong, black: void)."""
    height, width = truth.shape
    size = min(width, WIDTH), max(1, height * min(width, WIDTH) // width)
    image = Image.fromarray(read_rgb(path)).resize(size)
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
    return [jpeg(picture) for picture in pictures]
