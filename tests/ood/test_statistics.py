import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import EmpiricalCovariance

from pipelines.ood.statistics import (
    ClassCounts,
    ClassStatistics,
    EnergyMoments,
    ScoreHistogram,
    merge_all,
)

NUM_CLASSES = 4


@st.composite
def shards(draw):
    """Rows, labels, and a shuffled split of the row numbers, some parts empty."""
    seed = draw(st.integers(0, 2**32 - 1))
    num_rows, num_columns = draw(st.integers(2, 60)), draw(st.integers(1, 5))
    offset = draw(st.sampled_from([0.0, 1.0, -300.0]))
    generator = np.random.default_rng(seed)
    features = generator.normal(offset, 2.0, (num_rows, num_columns))
    labels = generator.integers(0, draw(st.integers(1, NUM_CLASSES)), num_rows)
    cuts = np.sort(generator.integers(0, num_rows + 1, draw(st.integers(0, 6))))
    parts = np.split(generator.permutation(num_rows), cuts)
    generator.shuffle(parts)
    return features, labels, parts


def class_statistics(features, labels, **options):
    return ClassStatistics.from_batch(features, labels, num_classes=NUM_CLASSES, **options)


@settings(deadline=None, max_examples=80)
@given(shards())
def test_shards_in_any_order_give_the_one_shot_counts_exactly(case):
    _, labels, parts = case
    whole = ClassCounts.from_batch(labels, NUM_CLASSES)
    merged = merge_all(ClassCounts.from_batch(labels[part], NUM_CLASSES) for part in parts)
    assert merged.counts.tolist() == whole.counts.tolist()
    assert whole.counts.tolist() == [int(sum(labels == c)) for c in range(NUM_CLASSES)]
    assert merged.prior.sum() == pytest.approx(1, abs=1e-15)


@settings(deadline=None, max_examples=80)
@given(shards(), st.booleans())
def test_shards_in_any_order_give_the_one_shot_means_and_covariance(case, normalize):
    features, labels, parts = case
    merged = merge_all(
        class_statistics(features[part], labels[part], normalize=normalize) for part in parts
    )
    rows = features.copy()
    if normalize:
        rows = np.stack([row / np.sqrt(sum(x * x for x in row)) for row in rows])
    scale = max(1.0, np.abs(rows).max())
    residuals = rows.copy()
    for c in set(labels.tolist()):
        mean = np.mean(rows[labels == c], axis=0)
        residuals[labels == c] -= mean
        np.testing.assert_allclose(merged.means[c], mean, rtol=0, atol=1e-10 * scale)
    tied = EmpiricalCovariance(assume_centered=True).fit(residuals).covariance_
    np.testing.assert_allclose(merged.covariance, tied, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(merged.mean, rows.mean(axis=0), rtol=0, atol=1e-10 * scale)
    total = np.cov(rows.T, bias=True).reshape(tied.shape)
    np.testing.assert_allclose(merged.total_covariance, total, rtol=1e-10, atol=1e-10)
    assert merged.num_samples == len(rows)


@settings(deadline=None, max_examples=80)
@given(shards())
def test_shards_in_any_order_give_the_one_shot_energy_moments(case):
    features, _, parts = case
    energy = features[:, 0]
    merged = merge_all(EnergyMoments.from_batch(energy[part]) for part in parts)
    assert merged.count == len(energy)
    assert merged.mean == pytest.approx(np.mean(energy), rel=1e-10, abs=1e-12)
    assert merged.std == pytest.approx(np.std(energy), rel=1e-10, abs=1e-10)
    assert (merged.minimum, merged.maximum) == (energy.min(), energy.max())


@settings(deadline=None, max_examples=80)
@given(shards(), st.integers(1, 40))
def test_shards_in_any_order_give_the_one_shot_histogram_exactly(case, num_bins):
    features, _, parts = case
    scores, options = features[:, 0], {"low": -1.0, "high": 2.5, "num_bins": num_bins}
    merged = merge_all(ScoreHistogram.from_batch(scores[part], **options) for part in parts)
    edges = [-np.inf, *(-1.0 + 3.5 * i / num_bins for i in range(num_bins + 1)), np.inf]
    counts = [sum(1 for x in scores if low <= x < high) for low, high in itertools.pairwise(edges)]
    assert merged.counts.tolist() == counts


def test_a_large_offset_does_not_cancel():
    generator = np.random.default_rng(0)
    features = generator.integers(-8, 9, (400, 3)).astype(float)
    labels = generator.integers(0, NUM_CLASSES, 400)
    moved = [
        class_statistics(features[i : i + 40] + 2.0**30, labels[i : i + 40])
        for i in range(0, 400, 40)
    ]
    near = class_statistics(features, labels)
    np.testing.assert_allclose(merge_all(moved).covariance, near.covariance, rtol=1e-7)
    energies = merge_all(EnergyMoments.from_batch(features[i::7, 0] + 2.0**30) for i in range(7))
    assert energies.std == pytest.approx(np.std(features[:, 0]), rel=1e-7)


def test_blocks_of_one_batch_agree_with_one_block(monkeypatch):
    generator = np.random.default_rng(1)
    features, labels = generator.normal(size=(50, 4)), generator.integers(0, NUM_CLASSES, 50)
    whole = class_statistics(features, labels)
    histogram = ScoreHistogram.from_batch(features[:, 0], low=-1, high=1, num_bins=9)
    monkeypatch.setattr("pipelines.ood.statistics._ROWS", 7)
    monkeypatch.setattr("pipelines.ood.statistics._SCORES", 7)
    blocks = class_statistics(features, labels)
    np.testing.assert_allclose(blocks.scatter, whole.scatter, rtol=1e-12)
    again = ScoreHistogram.from_batch(features[:, 0], low=-1, high=1, num_bins=9)
    assert again.counts.tolist() == histogram.counts.tolist()


@pytest.mark.parametrize(
    "record",
    [
        ClassCounts.from_batch([0, 2, 2], NUM_CLASSES),
        class_statistics(np.eye(3), [0, 1, 1]),
        EnergyMoments.from_batch([1.0, 4.0]),
        ScoreHistogram.from_batch([0.2, 0.9], low=0, high=1, num_bins=4),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_pickle_and_an_empty_shard_changes_nothing(record):
    again = pickle.loads(pickle.dumps(record))
    empties = {
        ClassCounts: lambda: ClassCounts.from_batch([], NUM_CLASSES),
        ClassStatistics: lambda: class_statistics(np.empty((0, 3)), []),
        EnergyMoments: lambda: EnergyMoments.from_batch([]),
        ScoreHistogram: lambda: ScoreHistogram.from_batch([], low=0, high=1, num_bins=4),
    }
    empty = empties[type(record)]()
    for merged in (again, record.merge(empty), empty.merge(record)):
        for name, value in vars(record).items():
            np.testing.assert_array_equal(vars(merged)[name], value)


def test_half_precision_features_are_summed_in_float64():
    features = torch.tensor([[1.0], [1.0 / 3]]).to(torch.bfloat16)
    merged = class_statistics(features, torch.tensor([0, 0]))
    assert merged.means.dtype == np.float64
    assert merged.means[0, 0] == (1.0 + float(features[1, 0])) / 2


NAN = np.array([[0.0, 1.0], [np.nan, 1.0], [0.0, np.inf]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge_all([]), "no statistics"),
        (lambda: ClassCounts.from_batch([0, 4], NUM_CLASSES), r"0\.\.3"),
        (lambda: ClassCounts.from_batch([-1], NUM_CLASSES), r"0\.\.3"),
        (lambda: ClassCounts.from_batch([0.5], NUM_CLASSES), "integers"),
        (lambda: ClassCounts.from_batch([[1]], NUM_CLASSES), "integers"),
        (lambda: ClassCounts(np.zeros(3, np.int64)).prior, "no samples"),
        (
            lambda: ClassCounts.from_batch([0], 2).merge(ClassCounts.from_batch([0], 3)),
            "number of classes",
        ),
        (lambda: class_statistics(NAN, [0, 1, 2]), r"2 NaN or infinite .* row 1"),
        (lambda: class_statistics(np.eye(2), [0]), "features and labels"),
        (lambda: class_statistics(np.ones(3), [0, 1, 2]), "features"),
        (lambda: class_statistics(np.zeros((2, 2)), [0, 1], normalize=True), "zeros"),
        (
            lambda: class_statistics(np.eye(2), [0, 1]).merge(class_statistics(np.eye(3), [0] * 3)),
            "shape",
        ),
        (
            lambda: class_statistics(np.eye(2), [0, 1]).merge(
                class_statistics(np.eye(2), [0, 1], normalize=True)
            ),
            "normalisation",
        ),
        (lambda: EnergyMoments.from_batch([1.0, np.nan]), "energies holds 1 NaN"),
        (lambda: EnergyMoments.from_batch([[1.0]]), r"shape \(N,\)"),
        (lambda: EnergyMoments.from_batch([]).std, "no energies"),
        (lambda: ScoreHistogram.from_batch([0.0], low=1, high=1), "low < high"),
        (lambda: ScoreHistogram.from_batch([0.0], low=0, high=1, num_bins=0), "num_bins"),
        (
            lambda: ScoreHistogram.from_batch([0.0], low=0, high=1).merge(
                ScoreHistogram.from_batch([0.0], low=0, high=2)
            ),
            "bins",
        ),
    ],
)
def test_mistakes_are_value_errors_that_say_which(call, message):
    with pytest.raises(ValueError, match=message):
        call()
