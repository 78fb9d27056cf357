"""A benchmark's sets as features, and the view that opens no test set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import FeatureCache
from pipelines.data.storage import Storage
from pipelines.records import TRAINING_ROLES, SetName
from tests.feature_cache import make_cache

OPEN = ("train", "validation", "outliers", "validation_ood/x", "validation_shifted/w")
CLOSED = ("test", "shifted/y", "ood/near/z")


def feature(source: str, number: int) -> list[float]:
    return [float(len(source)), float(number), -1.0]


def cache(storage: Storage, source: str, good: list[int], bad: list[int]) -> FeatureCache:
    rows = {f"{n:02d}": feature(source, n) for n in good}
    return make_cache(storage, source, rows, [f"{n:02d}" for n in bad])


@pytest.fixture
def sets(tmp_path: Path) -> FeatureSets:
    storage = Storage(str(tmp_path))
    caches = {
        "a": cache(storage, "a", [0, 1, 2, 3, 5], [4]),
        "bb": cache(storage, "bb", [0, 1], [2]),
    }
    chosen = {
        "train": Selection(("bb", "a", "a"), ("01", "03", "00"), (1, 0, 2)),
        "validation": Selection(("a", "a"), ("05", "04"), (1, 0)),
        "outliers": Selection(("bb",), ("02",), (-1,)),
        "validation_ood/x": Selection(("a",), ("01",), (-1,)),
        "validation_shifted/w": Selection(("a",), ("00",), (2,)),
        "test": Selection(("a",), ("02",), (0,)),
        "shifted/y": Selection(("bb",), ("00",), (1,)),
        "ood/near/z": Selection(("a",), ("01",), (-1,)),
    }
    benchmark = Benchmark("toy", ("p", "q", "r"), ("a {}.",), "", {}, chosen, "address")
    return FeatureSets(benchmark, caches)


def test_rows_of_several_sources_keep_key_label_and_feature_together(sets: FeatureSets) -> None:
    train = sets.load("train")
    found = {
        (key, int(label)): row.tolist()
        for key, label, row in zip(train.keys, train.labels, train.features, strict=True)
    }
    assert found == {
        ("01", 1): feature("bb", 1),
        ("03", 0): feature("a", 3),
        ("00", 2): feature("a", 0),
    }
    assert (train.features.dtype, train.labels.dtype) == (np.float32, np.int64)
    assert len(train) == 3


def test_rejected_images_are_left_out(sets: FeatureSets) -> None:
    validation = sets.load("validation")
    assert validation.keys == ("05",)
    assert validation.labels.tolist() == [1]


def test_a_set_without_one_image_left_is_a_users_error(sets: FeatureSets) -> None:
    with pytest.raises(UserError, match="set 'outliers': none of its 1 images could be read"):
        sets.load("outliers")


@pytest.mark.parametrize("name", CLOSED)
def test_the_training_view_opens_no_test_set(
    sets: FeatureSets, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = sets.for_training()
    assert sets.load(name).keys

    def refuse(*_: object) -> None:
        raise AssertionError("read before it was refused")

    monkeypatch.setattr(FeatureCache, "load", refuse)
    monkeypatch.setattr(FeatureCache, "present", refuse)
    with pytest.raises(PermissionError, match="test data"):
        view.load(name)


def test_the_training_view_opens_the_others(sets: FeatureSets) -> None:
    view = sets.for_training()
    for name in ("train", "validation", "validation_ood/x", "validation_shifted/w"):
        np.testing.assert_array_equal(view.load(name).features, sets.load(name).features)
    assert {SetName.parse(name).role for name in OPEN} == set(TRAINING_ROLES)


def test_the_address_follows_members_labels_and_features(sets: FeatureSets) -> None:
    first = sets.address(["train"])
    assert first == sets.address(["train"])
    assert first != sets.address(["train", "validation"])
    train = sets.benchmark.sets["train"]
    others = [
        Selection(train.sources, train.keys, (1, 0, 1)),
        Selection(train.sources, ("00", "03", "00"), train.labels),
        Selection(("a", "a", "a"), train.keys, train.labels),
    ]
    for other in others:
        chosen = {**sets.benchmark.sets, "train": other}
        benchmark = Benchmark("toy", ("p", "q", "r"), ("a {}.",), "", {}, chosen, "address")
        assert FeatureSets(benchmark, sets.caches).address(["train"]) != first
    swapped = FeatureSets(sets.benchmark, {**sets.caches, "a": sets.caches["bb"]})
    assert swapped.address(["train"]) != first


def test_views_of_the_training_images_stand_by_row_and_in_the_address(
    sets: FeatureSets, tmp_path: Path
) -> None:
    def views_in(source: str, numbers: list[int]) -> FeatureCache:
        rows = {f"{n:02d}": feature(source, n + 20) + feature(source, n + 40) for n in numbers}
        return make_cache(Storage(str(tmp_path)), f"views-{source}", rows)

    assert sets.views_of("train") is None
    views = {"a": views_in("a", [0, 3]), "bb": views_in("bb", [1])}
    having = replace(sets, views=views).for_training()
    found = having.views_of("train")
    assert found is not None
    expected = {
        ("01", 1): [feature("bb", 21), feature("bb", 41)],
        ("03", 0): [feature("a", 23), feature("a", 43)],
        ("00", 2): [feature("a", 20), feature("a", 40)],
    }
    train = having.load("train")
    for key, label, row in zip(train.keys, train.labels, found, strict=True):
        np.testing.assert_array_equal(row, np.asarray(expected[key, int(label)], np.float32))
    assert having.address(["train"]) != sets.address(["train"])
    assert having.address(["test"]) == replace(having, views={"bb": views["bb"]}).address(["test"])
