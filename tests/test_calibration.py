"""Expected calibration error, against its definition."""

import numpy as np
import pytest

from mmseg_volo.evaluation.calibration import BINS, count_bins, expected_calibration_error, reliability
from mmseg_volo.models.confidence import CERTAIN


def by_definition(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Equation 3 of Guo et al. (2017), bin by bin, in float64."""
    error = 0.0
    for m in range(1, BINS + 1):
        inside = (confidence > (m - 1) / BINS) & (confidence <= m / BINS)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return 100 * error


def made_up(shape: tuple[int, int] = (60, 70)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = (1 - rng.random(shape) ** 3).clip(0.02)
    correct = rng.random(shape) < confidence**2  # too sure
    return confidence, correct, rng.random(shape) < 0.9


def test_the_error_follows_its_definition():
    confidence, correct, labelled = made_up()
    steps = np.round(confidence * CERTAIN).astype(np.uint16)
    bins = count_bins(steps, correct, labelled)
    exact = by_definition(confidence[labelled], correct[labelled])
    assert expected_calibration_error(bins) == pytest.approx(exact, abs=1e-3) and exact > 5
    assert bins.dtype == np.int64 and bins[0].sum() == labelled.sum() and bins[2].sum() == (correct & labelled).sum()
    for m, row in enumerate(reliability(bins)):
        inside = labelled & (steps > m * CERTAIN / BINS) & (steps <= (m + 1) * CERTAIN / BINS)
        assert row['pixels'] == inside.sum()
        if inside.any():
            assert row['accuracy'] == pytest.approx(100 * correct[inside].mean())
            assert row['confidence'] == pytest.approx(100 * steps[inside].mean() / CERTAIN)
            assert row['low'] <= row['confidence'] <= row['high']


def test_a_bin_holds_its_upper_bound_and_the_first_one_zero():
    bounds = np.arange(BINS + 1) * (CERTAIN // BINS)
    values = np.concatenate([bounds, bounds[:-1] + 1]).astype(np.uint16)[None]
    every = np.ones(values.shape, bool)
    assert count_bins(values, every, every)[0].tolist() == [3, *([2] * (BINS - 1))]


def test_images_add_up():
    confidence, correct, labelled = made_up()
    steps = np.round(confidence * CERTAIN).astype(np.uint16)
    halves = [count_bins(steps[part], correct[part], labelled[part]) for part in (slice(0, 25), slice(25, None))]
    assert np.array_equal(sum(halves), count_bins(steps, correct, labelled))


@pytest.mark.parametrize(('accuracy', 'error'), [(1.0, 20.0), (0.8, 0.0), (0.0, 80.0)])
def test_a_single_confidence_errs_by_its_distance_from_the_accuracy(accuracy, error):
    correct = (np.arange(1000) < 1000 * accuracy)[None]
    bins = count_bins(np.full(correct.shape, 0.8 * CERTAIN, np.uint16), correct, np.ones_like(correct))
    assert expected_calibration_error(bins) == pytest.approx(error, abs=1e-9)
    assert [row['accuracy'] for row in reliability(bins) if row['pixels']] == [pytest.approx(100 * accuracy)]
