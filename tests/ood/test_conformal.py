"""Thresholds and p-values with a promise: 10,000 calibrations of known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta

from pipelines.ood import threshold_at_tpr
from pipelines.ood.conformal import ThresholdRule, p_values, threshold, threshold_rank, unknown

DRAWS = 10_000


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize(("size", "tpr"), [(19, 0.95), (99, 0.9), (57, 0.93)])
def test_a_conformal_threshold_rejects_the_promised_share_on_average(
    random: np.random.Generator, size: int, tpr: float
) -> None:
    """Scores are uniform, so the share that a threshold rejects is the threshold itself."""
    rank = threshold_rank(size, tpr, "conformal")
    rejected = np.sort(random.random((DRAWS, size)), axis=1)[:, rank - 1]
    error = rejected.std() / math.sqrt(DRAWS)
    assert rejected.mean() <= 1 - tpr + 3 * error
    # No higher rank keeps the promise.
    assert (rank + 1) / (size + 1) > 1 - tpr


@pytest.mark.parametrize(("size", "tpr", "confidence"), [(100, 0.95, 0.9), (60, 0.9, 0.99)])
def test_a_conditional_threshold_keeps_its_promise_with_the_confidence(
    random: np.random.Generator, size: int, tpr: float, confidence: float
) -> None:
    rank = threshold_rank(size, tpr, "conformal_conditional", confidence)
    rejected = np.sort(random.random((DRAWS, size)), axis=1)[:, rank - 1]
    kept = (rejected <= 1 - tpr).mean()
    assert kept >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / DRAWS)
    # The share that rank k of n uniform scores rejects follows Beta(k, n + 1 - k).
    assert beta.cdf(1 - tpr, rank, size + 1 - rank) >= confidence
    assert beta.cdf(1 - tpr, rank + 1, size - rank) < confidence


def test_the_quantile_promises_less_than_it_seems(random: np.random.Generator) -> None:
    """Why there are other rules: of 20 images it keeps 95 %, and rejects 9.5 % of new ones."""
    rejected = [threshold(scores, 0.95) for scores in random.random((DRAWS, 20))]
    assert np.mean(rejected) == pytest.approx(2 / 21, abs=0.003)


def test_equal_scores_only_lower_the_rate(random: np.random.Generator) -> None:
    drawn = random.integers(5, size=(2000, 39)).astype(float)
    new = random.integers(5, size=2000)
    rejected = [n < threshold(d, 0.9, "conformal") for d, n in zip(drawn, new, strict=True)]
    assert np.mean(rejected) <= 0.1
    assert threshold(np.ones(40), 0.9, "conformal") == 1.0


def test_the_quantile_is_threshold_at_tpr(random: np.random.Generator) -> None:
    for size in range(1, 40):
        scores = np.round(random.normal(size=size), 1)
        for tpr in (0.5, 0.9, 0.95, 1.0):
            assert threshold(scores, tpr) == threshold_at_tpr(scores, tpr)


@pytest.mark.parametrize(
    ("size", "tpr", "rank"), [(9, 0.9, 1), (19, 0.95, 1), (99, 0.95, 5), (100, 0.99, 1)]
)
def test_ranks_by_hand(size: int, tpr: float, rank: int) -> None:
    """floor(alpha (n + 1)); 1 - 0.9 is a little under 0.1, which must not cost a rank."""
    assert threshold_rank(size, tpr, "conformal") == rank


@pytest.mark.parametrize(
    ("size", "tpr", "rule", "message"),
    [
        (8, 0.9, "conformal", "8 ID images are too few .* at most 0.1 .* conformal needs 9"),
        (40, 0.95, "conformal_conditional", "40 ID images are too few .* needs 45"),
        (10, 1.0, "conformal", "no threshold promises to reject no ID image"),
        (0, 0.9, "conformal", "at least one score"),
        (9, 0.0, "conformal", r"tpr must lie in \(0, 1\]"),
    ],
)
def test_a_calibration_set_that_cannot_promise_is_refused(
    size: int, tpr: float, rule: ThresholdRule, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        threshold_rank(size, tpr, rule)


def test_the_number_that_is_asked_for_is_enough() -> None:
    assert threshold_rank(9, 0.9, "conformal") == 1
    assert threshold_rank(45, 0.95, "conformal_conditional") == 1


def test_p_values_by_hand() -> None:
    calibration = np.array([0.3, 0.1, 0.2, 0.2])
    found = p_values(calibration, np.array([0.0, 0.1, 0.2, 0.25, 0.9]))
    np.testing.assert_allclose(found, np.array([1, 2, 4, 4, 5]) / 5)


def test_marginal_p_values_are_no_smaller_than_uniform_ones(random: np.random.Generator) -> None:
    drawn, new = random.normal(size=(DRAWS, 30)), random.normal(size=DRAWS)
    found = np.array([p_values(d, n[None])[0] for d, n in zip(drawn, new, strict=True)])
    for level in (0.05, 0.1, 0.3, 0.7):
        assert (found <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


def test_conditional_p_values_hold_for_every_level_at_once(random: np.random.Generator) -> None:
    """For uniform scores the share below the j-th smallest, of rank j, is that score itself."""
    size, confidence = 40, 0.9
    bounds = p_values(np.arange(size, dtype=float), np.arange(size) - 0.5, confidence)
    assert (np.diff(bounds) >= 0).all()
    ordered = np.sort(random.random((DRAWS, size)), axis=1)
    held = (ordered <= bounds).all(axis=1).mean()
    assert held >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / DRAWS)
    assert held < 1


def test_conditional_bounds_by_hand() -> None:
    """n = 4, k = 2, delta = 0.1: b_j = 1 - sqrt(0.1 i (i - 1) / 12) with i = 5 - j."""
    bounds = p_values(np.arange(4.0), np.arange(5) - 0.5, 0.9)
    expected = [1 - math.sqrt(0.1 * i * (i - 1) / 12) for i in (4, 3, 2)]
    np.testing.assert_allclose(bounds, [*expected, 1, 1], rtol=1e-12)


def test_benjamini_hochberg_bounds_the_share_of_id_images_among_the_unknown(
    random: np.random.Generator,
) -> None:
    shares = []
    for _ in range(1000):
        calibration = random.normal(size=200)
        batch = np.concatenate([random.normal(size=40), random.normal(-3.5, 1, size=20)])
        called = unknown(p_values(calibration, batch), 0.2)
        shares.append(called[:40].sum() / max(called.sum(), 1))
    assert 0.05 < np.mean(shares) <= 0.2 + 3 * np.std(shares) / math.sqrt(1000)


def test_benjamini_hochberg_by_hand() -> None:
    """Sorted p_(i) are called unknown up to the last with p_(i) <= q i / m: 0.02, 0.04, 0.06."""
    p = np.array([0.04, 0.9, 0.01, 0.031, 0.5])
    assert unknown(p, 0.1).tolist() == [True, False, True, True, False]
    assert not unknown(np.array([0.3, 0.9]), 0.1).any()


def test_what_is_no_p_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], came 0.1 to 1.5"):
        unknown(np.array([0.1, 1.5]), 0.1)
    with pytest.raises(ValueError, match=r"false_alarms must lie in \(0, 1\), came 1"):
        unknown(np.array([0.1]), 1)
    with pytest.raises(ValueError, match="calibration is empty"):
        p_values(np.zeros(0), np.ones(1))
