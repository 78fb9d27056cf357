"""Arrays beside the features: loaded for the right rows, and only where a method asks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingJob, check, train_in_process
from pipelines.heads.base import HeadOutput
from pipelines.methods import METHODS, MethodPlugin
from pipelines.sweep import stage as sweep
from tests.feature_cache import make_cache
from tests.small_clip import small_clip, toy_data

DOMAINS = {"a": ["photo", "cartoon", "photo", None], "b": ["art", "art", "sketch", "art"]}


class Listed:
    """A source that knows its images' domains."""

    def __init__(self, domains: list[str | None]) -> None:
        self.domains = domains

    def index(self) -> pa.Table:
        keys = [str(number) for number in range(len(self.domains))]
        return pa.table({"key": keys, "domain": pa.array(self.domains, pa.string())})


def local_of(source: str, key: int) -> list[list[float]]:
    """(P, D) = (2, 3), another for every image."""
    start = {"a": 0.0, "b": 100.0}[source] + 10 * key
    return [[start, start + 1, start + 2], [start + 3, start + 4, start + 5]]


def opened(folder: Path, *, local: bool = True, train: str = "baab") -> FeatureSets:
    storage = Storage(str(folder))
    caches = {}
    for source in DOMAINS:
        rows = {str(key): [float(key), 0.0, float(len(source))] for key in range(4)}
        more = {str(key): local_of(source, key) for key in range(4)} if local else None
        caches[source] = make_cache(storage, f"{source}{local}", rows, local=more)
    keys = ("2", "1", "0", "0")
    sets = {
        "train": Selection(tuple(train), keys, (1, 0, 1, 0)),
        "validation": Selection(("b", "a"), ("3", "2"), (1, 0)),
        "outliers": Selection(("a",), ("3",), (-1,)),
        "test": Selection(("a",), ("3",), (0,)),
    }
    sources = {name: Listed(domains) for name, domains in DOMAINS.items()}
    benchmark = Benchmark("toy", ("p", "q"), ("a {}.",), "", sources, sets, "address")
    return FeatureSets(benchmark, caches)


def asking(*columns: str, head: tuple[str, ...] = (), outliers: bool = False):
    """A method that asks for these columns, and whose head does."""
    coop = METHODS["coop"].Config

    class Head(type(coop().head)):  # type: ignore[misc]
        columns: ClassVar[tuple[str, ...]] = head

    class Method(coop):  # type: ignore[misc, valid-type]
        needs_outliers: ClassVar[bool] = outliers

    Method.columns = columns
    return Method.model_construct(**{**dict(coop()), "head": Head()})


def test_rows_of_several_sources_keep_their_local_features_and_domains(tmp_path: Path) -> None:
    sets = opened(tmp_path)
    data = sweep.training_data(
        sets.for_training(), [asking("domains", head=("local_features",), outliers=True)]
    )
    # Sources in order: a before b, as the features' rows are.
    chosen = [("a", 1), ("a", 0), ("b", 2), ("b", 0)]
    assert data.features[:, 0].tolist() == [key for _, key in chosen]
    assert data.columns["local_features"].tolist() == [local_of(*place) for place in chosen]
    # art 0, cartoon 1, photo 2, sketch 3: the training images' own domains in order.
    assert data.columns["domains"].tolist() == [1, 2, 3, 0]
    assert data.columns["domains"].dtype == np.int64
    expected = [local_of("a", 2), local_of("b", 3)]
    assert data.validation_columns["local_features"].tolist() == expected
    assert data.outlier_columns["local_features"].tolist() == [local_of("a", 3)]


def test_nothing_is_loaded_that_nothing_asks_for(tmp_path: Path) -> None:
    data = sweep.training_data(opened(tmp_path).for_training(), [METHODS["coop"].Config()])
    assert (data.columns, data.validation_columns, data.outlier_columns) == ({}, {}, {})
    # A loss reads its own training images only.
    data = sweep.training_data(opened(tmp_path).for_training(), [asking("local_features")])
    assert set(data.columns) == {"local_features"}
    assert (data.validation_columns, data.outlier_columns) == ({}, {})


def test_missing_local_features_and_domains_are_a_users_error(tmp_path: Path) -> None:
    without = opened(tmp_path, local=False).for_training()
    with pytest.raises(UserError, match=r"no local_features; embed with embed\.local_features"):
        sweep.training_data(without, [asking("local_features")])
    nameless = opened(tmp_path)
    changed = {**nameless.benchmark.sources, "a": Listed([None, None, "photo", None])}
    nameless = FeatureSets(replace(nameless.benchmark, sources=changed), nameless.caches)
    with pytest.raises(
        UserError, match=r"no domain is named for 2 of its 4 images \(first: a: 1\)"
    ):
        sweep.training_data(nameless.for_training(), [asking("domains")])


def test_images_that_are_named_no_domain_at_all_are_of_one(tmp_path: Path) -> None:
    sets = opened(tmp_path)
    nameless = dict.fromkeys(DOMAINS, Listed([None] * 4))
    sets = FeatureSets(replace(sets.benchmark, sources=nameless), sets.caches)
    data = sweep.training_data(sets.for_training(), [asking("domains")])
    assert data.columns["domains"].tolist() == [0, 0, 0, 0]


def test_no_test_set_is_opened_for_its_local_features(tmp_path: Path) -> None:
    view = opened(tmp_path).for_training()
    with pytest.raises(PermissionError, match="test data"):
        view.column("test", "local_features")
    with pytest.raises(PermissionError, match="test data"):
        view.domains("test")


def test_a_method_without_its_columns_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="method=coop with head=coop reads local_features of the"):
        check(TrainingJob(asking("local_features"), 0), replace(toy_data(), columns={}))


def test_the_loop_gives_a_head_the_local_features_of_its_own_images(monkeypatch) -> None:
    data = toy_data(per_class=4)
    rng = np.random.default_rng(5)

    def draw(rows: int):
        return rng.normal(size=(rows, 3, 16)).astype(np.float32)

    data = replace(
        data,
        columns={"local_features": draw(16)},
        validation_columns={"local_features": draw(32)},
        outlier_columns={"local_features": draw(40)},
    )
    whole = [
        (data.features, data.columns),
        (data.outliers, data.outlier_columns),
        (data.validation_features, data.validation_columns),
    ]
    place = {
        row.tobytes(): columns["local_features"][number]
        for features, columns in whole
        for number, row in enumerate(features)
    }
    seen = []
    head_type = type(small_coop())
    encode = head_type.encode

    def watch(self, features, local):
        for row, found in zip(features, local, strict=True):
            assert np.array_equal(place[row.numpy().tobytes()], found.numpy())
        seen.append(len(features))
        found = encode(self, features)
        return HeadOutput(
            found.similarity, found.image_features, found.text_features, rows={"n": local[:, 0, 0]}
        )

    monkeypatch.setattr(head_type, "encode", watch)

    def loss(outputs, batch, config):
        # The rows that a head gives are those of the images, without the outliers.
        expected = batch.columns["local_features"][:, 0, 0]
        assert torch.equal(outputs.rows["n"], expected)
        return METHODS["coop"].loss(outputs, batch, config)

    watched = MethodPlugin(METHODS["coop"].Config, loss)
    monkeypatch.setattr(training_run, "METHODS", {**METHODS, "watched": watched})
    method = asking(head=("local_features",), outliers=True)
    short = method.training.model_copy(update={"epochs": 1, "warmup_epochs": 0, "batch_size": 12})
    method = method.model_copy(update={"name": "watched", "training": short})
    train_in_process(TrainingJob(method, 0), data, small_clip())
    assert seen == [12 + 24, 4 + 24, 32]


def small_coop():
    from pipelines.heads import HeadContext, build
    from pipelines.heads.coop import Config

    data = toy_data(per_class=1)
    context = HeadContext(
        small_clip(),
        data.class_names,
        data.templates,
        torch.tensor(data.features),
        torch.tensor(data.labels),
    )
    return build(Config(num_context=2), context, 0)
