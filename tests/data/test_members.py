"""The images of some sets, shard by shard, whose bytes are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import FeatureManifest
from pipelines.data.storage import Storage
from tests.feature_cache import flip_a_byte, make_cache


@pytest.fixture
def sets(tmp_path: Path) -> FeatureSets:
    storage = Storage(str(tmp_path))
    rows = {f"{n:02d}": [float(n), 0.25 * n] for n in range(6)}
    local = {key: [[1.0, n], [2.0, n], [3.0, n]] for n, key in enumerate(rows)}
    caches = {
        "a": make_cache(storage, "a", rows, ["06"], local=local),
        "b": make_cache(storage, "b", {"x": [9.0, 9.0]}),
    }
    chosen = {
        "train": Selection(("a", "a", "a"), ("04", "01", "06"), (1, 0, 1)),
        "outliers": Selection(("b",), ("x",), (-1,)),
        "test": Selection(("a", "a"), ("02", "00"), (1, 0)),
    }
    return FeatureSets(Benchmark("toy", ("p", "q"), ("{}",), "", {}, chosen, ""), caches)


def test_a_shard_gives_the_rows_of_the_sets_that_were_asked_for(sets: FeatureSets) -> None:
    members = sets.members("test", "train")
    (shard,) = members.shards()
    assert (shard.source, shard.number, shard.entry.rows) == ("a", 0, 6)
    rows = members.read(shard, local=True)
    assert rows.keys.to_pylist() == ["00", "01", "02", "04"]
    assert [members.names[n] for n in rows.sets] == ["test", "train", "test", "train"]
    assert rows.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(rows.features[:, 0], [0, 1, 2, 4])
    assert rows.local is not None
    np.testing.assert_array_equal(rows.local[3], [[1, 4], [2, 4], [3, 4]])
    assert members.num_rows() == 4  # of five images one was rejected
    assert [s.source for s in sets.members("outliers", "train").shards()] == ["b", "a"]


def test_a_view_gives_no_images_of_a_set_that_it_may_not_open(sets: FeatureSets) -> None:
    view = sets.for_training()
    assert view.members("train", "outliers").names == ("train", "outliers")
    with pytest.raises(PermissionError, match="'test' is test data"):
        view.members("train", "test")
    blind = FeatureSets(sets.benchmark, sets.caches, ("train",))
    with pytest.raises(PermissionError, match="'outliers'"):
        blind.members("outliers")


def test_a_shard_of_other_bytes_is_refused(sets: FeatureSets) -> None:
    members = sets.members("train")
    (shard,) = members.shards()
    flip_a_byte(sets.caches["a"], 1.25)
    with pytest.raises(UserError, match=r"00000\.parquet: not the bytes that were written"):
        members.read(shard)
    with pytest.raises(UserError, match="not the bytes that were written"):
        sets.load("train")


def test_what_was_not_embedded_is_said_before_anything_is_read(sets: FeatureSets) -> None:
    members = sets.members("outliers")
    with pytest.raises(UserError, match=r"features b: no local_features; embed with embed\."):
        members.read(members.shards()[0], local=True)


def test_the_address_follows_the_features_of_its_own_sources_only(sets: FeatureSets) -> None:
    other = FeatureSets(sets.benchmark, {**sets.caches, "b": sets.caches["a"]})
    assert other.address(["train"]) == sets.address(["train"])
    assert other.address(["outliers"]) != sets.address(["outliers"])


def test_the_manifest_is_a_record(sets: FeatureSets) -> None:
    cache = sets.caches["a"]
    manifest = cache.manifest
    assert (manifest.rows, manifest.rejected, manifest.address) == (6, 1, "a")
    assert manifest.columns == {"feature": (2,), "local_features": (3, 2)}
    assert FeatureManifest.from_json(manifest.to_json(), "here") == manifest
    with pytest.raises(UserError, match=r"here: not a FeatureManifest of this version \(rows"):
        FeatureManifest.from_json(manifest.to_json().replace(b'"rows"', b'"lines"'), "here")
