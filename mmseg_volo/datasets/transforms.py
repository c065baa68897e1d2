"""mmseg's random crop and colour distortion: the same random numbers and pixels, in less time."""

import cv2
import numpy as np
from mmcv.transforms.utils import cache_randomness
from mmseg.datasets.transforms import PhotoMetricDistortion as MmsegPhotoMetricDistortion
from mmseg.datasets.transforms import RandomCrop as MmsegRandomCrop
from numpy import random

ATTEMPTS = 10


class RandomCrop(MmsegRandomCrop):
    """mmseg's ``RandomCrop`` with a faster count of the classes; the arguments are the same."""

    @cache_randomness
    def crop_bbox(self, results: dict) -> tuple[int, int, int, int]:
        """First and last row, first and last column of the crop.

        Crops are drawn until no class has more than ``cat_max_ratio`` of the pixels, at most 11 times.
        """
        box = self._draw(results['img'])
        if self.cat_max_ratio < 1:
            for _ in range(ATTEMPTS):
                if self._is_mixed(self.crop(results['gt_seg_map'], box)):
                    break
                box = self._draw(results['img'])
        return box

    def _draw(self, image: np.ndarray) -> tuple[int, int, int, int]:
        height, width = self.crop_size
        top = random.randint(0, max(image.shape[0] - height, 0) + 1)
        left = random.randint(0, max(image.shape[1] - width, 0) + 1)
        return top, top + height, left, left + width

    def _is_mixed(self, labels: np.ndarray) -> bool:
        if labels.dtype == np.uint8:
            counts = cv2.calcHist([np.ascontiguousarray(labels)], [0], None, [256], [0, 256]).ravel().astype(np.int64)
            counts[self.ignore_index] = 0
            counts = counts[counts > 0]
        else:
            found, counts = np.unique(labels, return_counts=True)
            counts = counts[found != self.ignore_index]
        return len(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio


class PhotoMetricDistortion(MmsegPhotoMetricDistortion):
    """mmseg's ``PhotoMetricDistortion`` with lookup tables for 8-bit images; the arguments are the same."""

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        """``alpha * img + beta``, rounded towards zero and limited to 0 to 255."""
        if img.dtype != np.uint8:
            return super().convert(img, alpha, beta)
        return cv2.LUT(img, super().convert(np.arange(256, dtype=np.uint8), alpha, beta))

    def saturation(self, img: np.ndarray) -> np.ndarray:
        """Multiply the saturation by a random number, in half of the cases."""
        if img.dtype != np.uint8:
            return super().saturation(img)
        if random.randint(2):
            table = _identity()
            factor = random.uniform(self.saturation_lower, self.saturation_upper)
            table[:, 1] = super().convert(table[:, 1], alpha=factor)
            img = _in_hsv(img, table)
        return img

    def hue(self, img: np.ndarray) -> np.ndarray:
        """Add a random number to the hue, in half of the cases."""
        if img.dtype != np.uint8:
            return super().hue(img)
        if random.randint(2):
            table = _identity()
            table[:, 0] = (table[:, 0].astype(int) + random.randint(-self.hue_delta, self.hue_delta)) % 180
            img = _in_hsv(img, table)
        return img


def _identity() -> np.ndarray:
    """The table of three channels that changes nothing, ``[256, 3]``."""
    return np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


def _in_hsv(img: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Apply a table to hue, saturation and value of a BGR image."""
    hsv = cv2.cvtColor(img, cv2.COLOR_BGR2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2BGR)
