import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pipelines.ood import Interval, augrc, expected_calibration_error, metrics
from pipelines.ood.curves import steps_of_sorted
from pipelines.ood.metrics import METRICS, bootstrap_interval, fpr_at_tpr, ood_metrics
from pipelines.ood.statistics import ScoreHistogram, merge_all

RATES = st.sampled_from([0.05, 0.5, 0.8, 0.9, 0.95, 1.0])


@st.composite
def scores(draw, max_size=40):
    """ID and OOD scores, continuous or with many ties."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_id, num_ood = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    id_scores = generator.normal(draw(st.sampled_from([-1.0, 0.0, 2.0])), 1, num_id)
    ood_scores = generator.normal(0, 1, num_ood)
    if draw(st.booleans()):
        return np.round(2 * id_scores), np.round(2 * ood_scores)
    return id_scores, ood_scores


def joined(id_scores, ood_scores):
    labels = np.r_[np.ones(len(id_scores)), np.zeros(len(ood_scores))]
    return labels, np.r_[id_scores, ood_scores]


def fpr_of_first_vertex(positive, negative, tpr):
    fprs, tprs, _ = roc_curve(*joined(positive, negative), drop_intermediate=False)
    return fprs[np.argmax(tprs >= tpr)]


def fpr_of_nearest_recall(positive, negative, tpr):
    """energy_ood's rule: walk up the thresholds from the first of full recall, keep the nearest."""
    thresholds = sorted({t for t in np.r_[positive, negative] if t <= min(positive)})[-1:]
    thresholds += sorted({t for t in np.r_[positive, negative] if t > min(positive)})
    best = None
    for threshold in thresholds:
        distance = abs(np.mean(positive >= threshold) - tpr)
        if best is None or distance < best[0]:
            best = distance, np.mean(negative >= threshold)
    return best[1]


def fpr_of_percentile(positive, negative, tpr):
    """HEAT's rule, on energies: strictly below the interpolated percentile."""
    return np.mean(-negative < np.percentile(-positive, 100 * tpr))


def smallest_error(id_scores, ood_scores):
    thresholds = [*np.unique(np.r_[id_scores, ood_scores]), np.inf]
    return min((np.mean(id_scores < t) + np.mean(ood_scores >= t)) / 2 for t in thresholds)


def oracle(id_scores, ood_scores, tpr=0.95):
    labels, values = joined(id_scores, ood_scores)
    return {
        "auroc": roc_auc_score(labels, values),
        "aupr_id": average_precision_score(labels, values),
        "aupr_ood": average_precision_score(1 - labels, -values),
        "fpr_at_tpr": fpr_of_first_vertex(id_scores, ood_scores, tpr),
        "fpr_at_tpr_ood": fpr_of_first_vertex(-ood_scores, -id_scores, tpr),
        "detection_error": smallest_error(id_scores, ood_scores),
    }


@settings(deadline=None, max_examples=150)
@given(scores(), RATES)
def test_all_metrics_equal_scikit_learns_curves(sides, tpr):
    assert ood_metrics(*sides, tpr=tpr) == pytest.approx(oracle(*sides, tpr), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(scores())
def test_each_row_of_the_table_is_its_oracle_and_its_function(sides):
    expected = oracle(*sides)
    assert set(expected) == set(METRICS)
    for name, row in METRICS.items():
        assert row(*sides) == pytest.approx(expected[name], abs=1e-12)
        assert row.function(*sides) == row(*sides)
        if name != "fpr_at_tpr_ood":
            assert getattr(metrics, name)(*sides) == row(*sides)


@settings(deadline=None, max_examples=60)
@given(scores(max_size=80), st.integers(1, 30))
def test_blocks_of_sorted_scores_give_what_one_block_gives(sides, block):
    id_sorted, ood_sorted = np.sort(sides[0]), np.sort(sides[1])
    parts = list(steps_of_sorted(id_sorted, ood_sorted, 0.9, block=block))
    (whole,) = steps_of_sorted(id_sorted, ood_sorted, 0.9, block=1000)
    for name in ("id", "ood", "id_above", "ood_above", "id_below", "ood_below"):
        joined_parts = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined_parts, getattr(whole, name))


def test_large_sides_are_sorted_in_threads_and_blocks_to_the_same_result(monkeypatch):
    generator = np.random.default_rng(0)
    sides = generator.normal(1, 1, 30_000).round(2), generator.normal(0, 1, 40_000).round(2)
    monkeypatch.setattr("pipelines.ood.curves._THREADED", 1000)
    assert ood_metrics(*sides) == pytest.approx(oracle(*sides), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(scores())
def test_metrics_see_only_the_order_of_scores(sides):
    id_scores, ood_scores = sides
    ranks = np.unique(np.r_[id_scores, ood_scores], return_inverse=True)[1].astype(float)
    moved = 3.0 * ranks[: len(id_scores)] - 7, 3.0 * ranks[len(id_scores) :] - 7
    assert ood_metrics(*moved) == ood_metrics(*sides)
    shuffled = np.random.default_rng(0).permutation(id_scores), ood_scores[::-1]
    assert ood_metrics(*shuffled) == ood_metrics(*sides)
    mirrored = ood_metrics(-ood_scores, -id_scores)
    for first, second in (
        ("auroc", "auroc"),
        ("aupr_id", "aupr_ood"),
        ("fpr_at_tpr", "fpr_at_tpr_ood"),
        ("detection_error", "detection_error"),
    ):
        assert mirrored[first] == pytest.approx(ood_metrics(*sides)[second], abs=1e-12)


def test_separated_and_equal_scores():
    best = ood_metrics([2.0, 3.0], [0.0, 1.0, 1.5])
    assert best == {name: float(row.higher_is_better) for name, row in METRICS.items()}
    tied = ood_metrics([1.0, 1.0], [1.0, 1.0, 1.0])
    expected = [0.5, 0.4, 0.6, 1.0, 1.0, 0.5]
    assert list(tied.values()) == pytest.approx(expected, abs=1e-15)


ID = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
OOD = np.array([0.5, 1.0, 1.2, 1.5, 2.5])


@pytest.mark.parametrize(
    ("positive", "tpr", "convention", "expected"),
    [
        # ID, 95 %: all ten are needed, threshold 1; nearest takes recall 0.9 (0.05 off, as 1.0
        # is, but first in rounding) just above 1; the 5th percentile is 1.45, strictly above.
        ("id", 0.95, "first", 4 / 5),
        ("id", 0.95, "nearest", 3 / 5),
        ("id", 0.95, "percentile", 2 / 5),
        # OOD, 80 %: four of five at or below 1.5; nearest is the last threshold before 2.5; the
        # 80th percentile of OOD is 1.7.
        ("ood", 0.8, "first", 1 / 10),
        ("ood", 0.8, "nearest", 2 / 10),
        ("ood", 0.8, "percentile", 1 / 10),
    ],
)
def test_golden_values_of_the_published_definitions(positive, tpr, convention, expected):
    value = fpr_at_tpr(ID, OOD, tpr, positive=positive, convention=convention)
    assert value == pytest.approx(expected, abs=1e-15)


@settings(deadline=None, max_examples=150)
@given(scores(), RATES, st.sampled_from(["id", "ood"]))
def test_conventions_and_directions_follow_their_definitions(sides, tpr, positive):
    oracles = {
        "first": fpr_of_first_vertex,
        "nearest": fpr_of_nearest_recall,
        "percentile": fpr_of_percentile,
    }
    ordered = sides if positive == "id" else (-sides[1], -sides[0])
    for convention, published in oracles.items():
        value = fpr_at_tpr(*sides, tpr, positive=positive, convention=convention)
        assert value == pytest.approx(published(*ordered, tpr), abs=1e-12), convention


@settings(deadline=None, max_examples=100)
@given(scores(), RATES)
def test_the_threshold_is_the_largest_that_keeps_enough_id(sides, tpr):
    id_scores, ood_scores = sides
    threshold = metrics.threshold_at_tpr(id_scores, tpr)
    is_ood = ood_scores < threshold
    assert np.mean(~is_ood) == fpr_at_tpr(id_scores, ood_scores, tpr)
    keeping = [t for t in id_scores if np.mean(id_scores >= t) >= tpr]
    assert threshold == max(keeping)


@pytest.mark.parametrize("size", [19, 20, 21, 100, 997, 1000])
def test_the_share_of_id_kept_is_compared_as_floats_are(size):
    threshold = metrics.threshold_at_tpr(np.arange(size, dtype=float), 0.95)
    kept = size - int(threshold)
    assert kept / size >= 0.95 > (kept - 1) / size


@settings(deadline=None, max_examples=150)
@given(scores(max_size=120), RATES, st.integers(1, 60), st.integers(1, 5))
def test_histogram_metrics_stay_within_their_bound(sides, tpr, num_bins, num_chunks):
    options = {"low": -2.0, "high": 3.0, "num_bins": num_bins}
    histograms = [
        merge_all(
            ScoreHistogram.from_batch(part, **options) for part in np.array_split(side, num_chunks)
        )
        for side in sides
    ]
    exact = ood_metrics(*sides, tpr=tpr)
    for name, bounded in metrics.histogram_metrics(*histograms, tpr).items():
        assert bounded.bound >= -1e-15
        assert abs(bounded.value - exact[name]) <= bounded.bound + 1e-12, name


def test_the_bound_of_a_histogram_shrinks_with_its_bins():
    generator = np.random.default_rng(0)
    sides = generator.normal(1, 1, 20_000), generator.normal(0, 1, 20_000)
    bounds = []
    for num_bins in (100, 10_000):
        histograms = [
            ScoreHistogram.from_batch(side, low=-6, high=7, num_bins=num_bins) for side in sides
        ]
        values = metrics.histogram_metrics(*histograms).values()
        bounds.append(np.array([value.bound for value in values]))
    assert (bounds[1] < bounds[0] / 20).all()
    assert (bounds[1] < 2e-3).all()


def test_histogram_metrics_refuse_other_bins_and_empty_sides():
    one = ScoreHistogram.from_batch([0.5], low=0, high=1, num_bins=4)
    other = ScoreHistogram.from_batch([0.5], low=0, high=1, num_bins=5)
    with pytest.raises(ValueError, match="bins must be equal"):
        metrics.histogram_metrics(one, other)
    with pytest.raises(ValueError, match="ood_scores is empty"):
        metrics.histogram_metrics(one, ScoreHistogram.from_batch([], low=0, high=1, num_bins=4))


@settings(deadline=None, max_examples=60)
@given(scores(), st.integers(0, 2**32 - 1))
def test_aurc_equals_a_plain_loop(sides, seed):
    id_scores, _ = sides
    correct = np.random.default_rng(seed).random(len(id_scores)) < 0.6
    risks = [np.mean(~correct[id_scores >= score]) for score in id_scores]
    assert metrics.aurc(id_scores, correct) == pytest.approx(np.mean(risks), abs=1e-12)


def test_augrc_by_hand():
    """Accepted one by one: right, wrong, right. Trapezoids of the risks 0, 0, 1/3, 1/3."""
    assert augrc([3.0, 2.0, 1.0], [True, False, True]) == pytest.approx((0 + 1 / 6 + 1 / 3) / 3)
    assert augrc([3.0, 2.0], [True, True]) == 0
    assert augrc([3.0, 2.0], [False, False]) == pytest.approx(1 / 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_expected_calibration_error_equals_a_plain_loop(seed, num_bins):
    generator = np.random.default_rng(seed)
    confidence = np.r_[generator.random(47), 1.0, 1.0, 0.0]
    correct = generator.random(50) < 0.7
    total = 0.0
    for i in range(num_bins):
        above = confidence > i / num_bins if i else confidence >= 0
        inside = above & (confidence <= (i + 1) / num_bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    value = expected_calibration_error(torch.from_numpy(confidence), correct, num_bins)
    assert value == pytest.approx(total, abs=1e-12)


def test_tensors_lists_and_half_precision_are_judged_in_float64():
    id_scores, ood_scores = torch.tensor([0.3, 0.7, 0.9]), torch.tensor([0.1, 0.7])
    expected = ood_metrics(id_scores.numpy(), ood_scores.numpy())
    with_gradient = id_scores.clone().requires_grad_()
    assert ood_metrics(with_gradient, ood_scores) == expected
    assert ood_metrics(id_scores.tolist(), ood_scores.tolist()) == expected
    assert ood_metrics(id_scores.bfloat16(), ood_scores.bfloat16()) == expected


def test_read_only_arrays_are_judged_and_left_as_they_are():
    """Parquet and Ray hand out arrays that cannot be written to."""
    id_scores, ood_scores, correct = np.array([3.0, 1.0, 2.0]), np.array([1.5, 0.0]), ID[:3] > 1
    confidence, right = np.array([0.5, 0.9]), np.array([True, True])
    for array in (id_scores, ood_scores, correct, confidence, right):
        array.flags.writeable = False
    assert ood_metrics(id_scores, ood_scores)["auroc"] == pytest.approx(5 / 6)
    assert metrics.aurc(id_scores, correct) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert expected_calibration_error(confidence, right) == pytest.approx(0.3)
    assert id_scores.tolist() == [3.0, 1.0, 2.0]
    broken = np.array([1.0, np.nan])
    broken.flags.writeable = False
    with pytest.raises(ValueError, match="NaN"):
        ood_metrics(broken, ood_scores)


@pytest.mark.parametrize("name", METRICS)
def test_resamples_from_counts_are_those_of_the_metric_called_on_each(name):
    generator = np.random.default_rng(3)
    sides = generator.normal(1, 1, 40).round(1), generator.normal(0, 1, 60).round(1)
    fast = bootstrap_interval(name, *sides, num_resamples=50, seed=1)
    slow = bootstrap_interval(lambda i, o: METRICS[name](i, o), *sides, num_resamples=50, seed=1)
    assert vars(fast) == pytest.approx(vars(slow), abs=1e-12)
    assert fast == bootstrap_interval(METRICS[name], *sides, num_resamples=50, seed=1)
    assert fast == bootstrap_interval(METRICS[name].function, *sides, num_resamples=50, seed=1)
    assert fast != bootstrap_interval(name, *sides, num_resamples=50, seed=2)
    assert fast.low <= fast.value <= fast.high


def test_the_interval_of_auroc_has_the_width_of_delongs_variance():
    generator = np.random.default_rng(0)
    id_scores, ood_scores = generator.normal(1, 1, 300), generator.normal(0, 1, 900)
    wins = (id_scores[:, None] > ood_scores[None]).astype(float)
    variance = wins.mean(axis=1).var() / 300 + wins.mean(axis=0).var() / 900
    interval = bootstrap_interval("auroc", id_scores, ood_scores, num_resamples=4000)
    width = 2 * 1.96 * np.sqrt(variance)
    assert interval.high - interval.low == pytest.approx(width, rel=0.05)
    assert interval.value == metrics.auroc(id_scores, ood_scores)


def test_resamples_are_stratified():
    """Without strata the share of ID would vary, and with it the average precision of ties."""
    interval = bootstrap_interval("aupr_id", np.zeros(10), np.zeros(30))
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_paired_intervals_use_the_same_resamples_for_both_methods():
    generator = np.random.default_rng(5)
    first = generator.normal(1, 1, 200), generator.normal(0, 1, 300)
    second = (
        first[0] - 0.1 + generator.normal(0, 0.1, 200),
        first[1] + generator.normal(0, 0.1, 300),
    )
    paired = metrics.paired_delta_interval("auroc", first, second, seed=3)
    alone = bootstrap_interval("auroc", *first, seed=3)
    assert paired.value == metrics.auroc(*first) - metrics.auroc(*second)
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 3
    same = metrics.paired_delta_interval("auroc", first, first)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    slow = functools.partial(metrics.auroc)
    again = metrics.paired_delta_interval(slow, first, second, seed=3)
    assert vars(again) == pytest.approx(vars(paired), abs=1e-12)


def test_paired_accuracy_interval_matches_the_normal_approximation():
    generator = np.random.default_rng(0)
    first = generator.random(2000) < 0.8
    second = np.where(generator.random(2000) < 0.9, first, generator.random(2000) < 0.5)
    delta = first.astype(float) - second
    interval = metrics.paired_accuracy_interval(first, second, num_resamples=4000)
    assert interval.value == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    width = 2 * 1.96 * delta.std() / np.sqrt(2000)
    assert interval.high - interval.low == pytest.approx(width, rel=0.05)


GOOD = np.array([0.0, 1.0])
BAD = {
    "is empty": np.array([]),
    "holds 1 NaN or infinite value.* row 1": np.array([0.0, np.nan]),
    "holds 2 NaN or infinite value.* row 0": np.array([np.inf, 1.0, -np.inf]),
    r"must have shape \(N,\)": np.zeros((2, 1)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", METRICS)
def test_no_metric_judges_what_it_cannot(name, message):
    function = METRICS[name]
    with pytest.raises(ValueError, match=f"id_scores {message}"):
        function(BAD[message], GOOD)
    with pytest.raises(ValueError, match=f"ood_scores {message}"):
        function(GOOD, BAD[message])
    with pytest.raises(ValueError, match=f"ood_scores {message}"):
        bootstrap_interval(name, GOOD, BAD[message])


def test_the_mean_of_intervals_is_that_of_values_and_ends():
    mean = Interval.mean([Interval(1.0, 0.5, 2.0), Interval(2.0, -1.0, 4.0)])
    assert mean == Interval(1.5, -0.25, 3.0)
    assert not mean.is_clear
    assert Interval(1.0, 0.5, 2.0).is_clear
    assert Interval(-1.0, -2.0, -0.5).is_clear


RIGHT = np.array([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ood_metrics(GOOD, []), "ood_scores is empty"),
        (lambda: ood_metrics(GOOD, GOOD, tpr=0.0), "tpr"),
        (lambda: fpr_at_tpr(GOOD, GOOD, 1.5), "tpr"),
        (lambda: fpr_at_tpr(GOOD, GOOD, 0.0, convention="percentile"), "tpr"),
        (lambda: fpr_at_tpr(GOOD, GOOD, positive="both"), "positive"),
        (lambda: fpr_at_tpr(GOOD, GOOD, convention="last"), "convention"),
        (lambda: metrics.threshold_at_tpr([]), "id_scores is empty"),
        (lambda: metrics.threshold_at_tpr(GOOD, float("nan")), "tpr"),
        (lambda: metrics.aurc([], np.array([], bool)), "scores is empty"),
        (lambda: metrics.aurc(GOOD, [1, 0]), "correct must be bool"),
        (lambda: metrics.aurc(GOOD, [True]), "correct must be bool"),
        (lambda: expected_calibration_error([0.5, 0.9], [True]), "correct must be bool"),
        (lambda: expected_calibration_error([0.5, 0.9], [1, 0]), "correct must be bool"),
        (lambda: expected_calibration_error([0.5, 0.9], RIGHT, 0), "num_bins"),
        (lambda: expected_calibration_error([0.5, 1.9], RIGHT), r"in \[0, 1\]"),
        (lambda: expected_calibration_error([0.5, np.nan], RIGHT), "NaN"),
        (lambda: expected_calibration_error([], []), "confidence is empty"),
        (lambda: augrc([0.5, np.nan], RIGHT), "NaN"),
        (lambda: augrc([0.5, 0.9], [1, 0]), "correct must be bool"),
        (lambda: bootstrap_interval("auc", GOOD, GOOD), "unknown metric 'auc'; known are auroc"),
        (lambda: bootstrap_interval("auroc", GOOD, GOOD, num_resamples=0), "num_resamples"),
        (
            lambda: metrics.paired_delta_interval("auroc", (GOOD, GOOD), (GOOD, ID)),
            "same samples",
        ),
        (lambda: metrics.paired_accuracy_interval(RIGHT, [True]), "correct must be bool"),
        (lambda: metrics.paired_accuracy_interval([], []), "first is empty"),
    ],
)
def test_mistakes_are_value_errors_that_say_which(call, message):
    with pytest.raises(ValueError, match=message):
        call()
