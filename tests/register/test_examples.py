"""Training images that a model carries: how many, which are nearest, as files."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.data.feature_sets import FeatureSet
from pipelines.register.examples import Examples

SIZES = {0: 9, 1: 3, 4: 30}  # images of each class; classes 2 and 3 have none


def images(dim: int = 5) -> FeatureSet:
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(list(SIZES), list(SIZES.values())))
    features = (7 * random.normal(size=(len(labels), dim))).astype(np.float32)
    keys = tuple(f"{label}/ü {place}\n.png" for place, label in enumerate(labels))
    return FeatureSet("train", keys, features, labels)


@pytest.mark.parametrize("per_class", [1, 5, 100])
def test_at_most_so_many_of_each_class_are_kept_as_they_are(per_class: int) -> None:
    known = images()
    found = Examples.of(known, per_class)
    assert found is not None
    counts = {label: min(per_class, size) for label, size in SIZES.items()}
    assert {label: (found.labels == label).sum() for label in SIZES} == counts
    assert len(set(found.keys)) == len(found.keys) == sum(counts.values())
    rows = [known.keys.index(key) for key in found.keys]
    assert known.labels[rows].tolist() == found.labels.tolist()
    for row, feature in zip(rows, found.features, strict=True):
        length = math.sqrt(sum(v * v for v in known.features[row].tolist()))
        expected = [v / length for v in known.features[row].tolist()]
        assert feature.dtype == np.float16
        assert feature.tolist() == pytest.approx(expected, abs=2**-11)
    again = Examples.of(known, per_class)
    assert again is not None
    assert again.to_bytes() == found.to_bytes()


def test_not_only_the_first_images_of_a_class_are_kept() -> None:
    found = Examples.of(images(), 5)
    assert found is not None
    of_four = [row for row, label in enumerate(images().labels) if label == 4]
    kept = [images().keys.index(k) for k, y in zip(found.keys, found.labels, strict=True) if y == 4]
    assert kept != of_four[:5]


def test_no_image_is_no_examples() -> None:
    assert Examples.of(images(), 0) is None


def test_the_nearest_have_the_largest_cosines() -> None:
    known = Examples.of(images(), 20)
    assert known is not None
    asked = images(5).features[:3] * np.float32(0.2)
    places, cosines = known.nearest(asked, 4)
    for row, query in enumerate(asked.tolist()):
        by_hand = []
        for place, feature in enumerate(known.features.astype(np.float64).tolist()):
            product = sum(a * b for a, b in zip(query, feature, strict=True))
            by_hand.append((product / math.sqrt(sum(v * v for v in query)), -place))
        best = sorted(by_hand, reverse=True)[:4]
        assert places[row].tolist() == [-place for _, place in best]
        assert cosines[row].tolist() == pytest.approx([cosine for cosine, _ in best], abs=1e-6)
    few = Examples(known.keys[:2], known.labels[:2], known.features[:2])
    assert few.nearest(asked, 4)[0].shape == (3, 2)
    twice = Examples(("a", "b"), np.zeros(2, np.int64), np.repeat(known.features[:1], 2, axis=0))
    assert twice.nearest(asked, 2)[0].tolist() == [[0, 1]] * 3


def test_a_file_holds_them_bit_for_bit() -> None:
    known = Examples.of(images(), 5)
    assert known is not None
    loaded = Examples.from_bytes(known.to_bytes())
    assert loaded.keys == known.keys
    np.testing.assert_array_equal(loaded.labels, known.labels)
    np.testing.assert_array_equal(loaded.features, known.features)
    assert loaded.features.dtype == np.float16
