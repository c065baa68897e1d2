"""How well the probability of a label says how often the label is right (https://arxiv.org/abs/1706.04599)."""

import numpy as np

from ..models.confidence import CERTAIN

BINS = 15  # of equal width, as in the paper; each holds its upper bound


def count_bins(confidence: np.ndarray, correct: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Per bin of confidence: pixels, sum of their confidences in 1/65535, correct pixels; int64 ``[3, bins]``.

    Args:
        confidence: probability of each label in 1/65535, uint16 ``[H, W]``.
        correct: whether the label is right, bool ``[H, W]``.
        labelled: which pixels count, bool ``[H, W]``.
    """
    code = (confidence.astype(np.int32) << 1) | correct
    values = np.bincount(code[labelled], minlength=2 * (CERTAIN + 1)).reshape(-1, 2)
    pixels = values.sum(1)
    # 65535 is 15 * 4369, so no value lies across a bound; 0 belongs to the first bin.
    counts = np.stack([pixels, pixels * np.arange(CERTAIN + 1), values[:, 1]])
    binned = counts[:, 1:].reshape(3, BINS, -1).sum(2)
    binned[:, 0] += counts[:, 0]
    return binned


def reliability(bins: np.ndarray) -> list[dict]:
    """Per bin: its bounds, its share of the pixels, mean confidence and accuracy in percent; None if it is empty."""
    pixels, confidence, correct = bins
    return [
        dict(
            low=100 * i / BINS,
            high=100 * (i + 1) / BINS,
            pixels=int(pixels[i]),
            confidence=float(100 * confidence[i] / CERTAIN / pixels[i]) if pixels[i] else None,
            accuracy=float(100 * correct[i] / pixels[i]) if pixels[i] else None,
        )
        for i in range(BINS)
    ]


def expected_calibration_error(bins: np.ndarray) -> float:
    """Mean distance between confidence and accuracy in percent, each bin weighted by its pixels (equation 3)."""
    pixels, confidence, correct = bins
    return float(100 * np.abs(confidence / CERTAIN - correct).sum() / pixels.sum())
