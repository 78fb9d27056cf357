"""Outliers counted shard by shard on Ray Data, against a loop over the rows that are held."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.code_digest import Code
from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import finish, write_shard
from pipelines.data.storage import Storage
from pipelines.finetune import outlier_prior as prior
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.methods import METHODS
from tests.feature_cache import flip_a_byte
from tests.ray.small_backbone import write_backbone
from tests.small_clip import CLASS_NAMES, small_clip, toy_data

TEMPLATES = ("a photo of a {}.", "a picture of a {}.")


def unit(rng, count):
    rows = rng.normal(size=(count, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def cache(storage, name, features, *, shard_rows, lost=()):
    """The features of keys NAME-0000 ... in shards of so many rows; the keys in `lost` rejected."""
    keys = [f"{name}-{number:04d}" for number in range(len(features))]
    receipts, bounds = [], []
    for shard, start in enumerate(range(0, len(keys), shard_rows)):
        part = keys[start : start + shard_rows]
        there = [k for k in part if k not in lost]
        rows = np.asarray([features[keys.index(k)] for k in there])
        rejected = [(k, "truncated", "cut off") for k in part if k in lost]
        receipts.append(
            write_shard(
                storage, name, shard=shard, keys=there, columns={"feature": rows}, rejected=rejected
            )
        )
        bounds.append((part[0], part[-1]))
    return keys, finish(storage, name, receipts=receipts, bounds=bounds, about={})


@pytest.fixture
def outliers(tmp_path):
    """Two sources in five shards; a third of one source are outliers, one of them unreadable."""
    rng, storage = np.random.default_rng(0), Storage(str(tmp_path / "outputs"))
    features = {"first": unit(rng, 90), "second": unit(rng, 25)}
    lost = "first-0002"
    names = {n: cache(storage, n, f, shard_rows=30, lost=[lost]) for n, f in features.items()}
    members = [("first", k) for k in names["first"][0][:60:2]]
    members += [("second", k) for k in names["second"][0][10:]]
    sources, keys = zip(*members, strict=True)
    chosen = Selection(sources, keys, (-1,) * len(keys))
    benchmark = Benchmark("toy", CLASS_NAMES, TEMPLATES, "", {}, {"outliers": chosen}, "toy")
    sets = FeatureSets(benchmark, {name: found for name, (_, found) in names.items()})
    row = {(n, k): features[n][i] for n, (keys, _) in names.items() for i, k in enumerate(keys)}
    held = np.asarray([row[member] for member in members if member[1] != lost])
    return storage, sets, held


def counted_in_a_loop(held):
    """Predictions by open_clip's own text features, one row after the other."""
    clip, counts = small_clip(), [0] * len(CLASS_NAMES)
    text = []
    for name in CLASS_NAMES:
        parts = clip.encode_text([template.format(name) for template in TEMPLATES]).double()
        mean = parts.mean(dim=0)
        text.append((mean / mean.norm()).tolist())
    for z in held.tolist():
        cosines = [sum(a * b for a, b in zip(z, h, strict=True)) for h in text]
        counts[cosines.index(max(cosines))] += 1
    return counts


@pytest.mark.usefixtures("ray_cluster")
def test_the_counts_of_shards_add_up_to_the_counts_of_the_whole(outliers, tmp_path, monkeypatch):
    storage, sets, held = outliers
    backbone = write_backbone(tmp_path)
    counts = prior.measure(sets.for_training(), backbone, storage)
    expected = counted_in_a_loop(held)
    assert counts.tolist() == expected
    assert sum(expected) == len(held) == 44
    assert len(set(expected)) > 1
    (name,) = storage.names("cache", "priors")
    storage.local("cache", "priors", name).unlink()
    here = prior.measure(sets.for_training(), backbone, storage, with_ray=False)
    assert here.tolist() == expected
    assert storage.names("cache", "priors") == [name]
    # The next time they are found.
    monkeypatch.setattr(prior, "map_shards", lambda *_, **__: pytest.fail("counted again"))
    assert prior.measure(sets.for_training(), backbone, storage).tolist() == expected
    # After an edit they are counted again.
    monkeypatch.setattr(prior, "prior_code", lambda: Code({"edited": "1"}, {}))
    with pytest.raises(pytest.fail.Exception, match="counted again"):
        prior.measure(sets.for_training(), backbone, storage)


def test_a_view_without_the_outliers_counts_none(outliers, tmp_path):
    """The pass used to read any set, whatever the view may open."""
    storage, sets, _ = outliers
    view = dataclasses.replace(sets, roles=("train", "validation"))
    with pytest.raises(PermissionError, match="'outliers'"):
        prior.measure(view, write_backbone(tmp_path), storage, with_ray=False)


def test_a_damaged_shard_is_not_counted(outliers, tmp_path):
    """It used to be read around its checksum: other counts, and no word."""
    storage, sets, _ = outliers
    shard = sets.caches["second"]
    flip_a_byte(shard, float(shard.load(["second-0012"])[0, 0]))
    with pytest.raises(UserError, match=r"second/00000\.parquet: not the bytes"):
        prior.measure(sets.for_training(), write_backbone(tmp_path), storage, with_ray=False)


def test_a_benchmark_without_outliers_is_refused(outliers, tmp_path):
    storage, sets, _ = outliers
    bare = dataclasses.replace(sets.benchmark, sets={})
    with pytest.raises(UserError, match="no set 'outliers'"):
        prior.measure(FeatureSets(bare, sets.caches), write_backbone(tmp_path), storage)


def test_the_pass_and_the_outliers_held_give_the_same_weights(outliers):
    _, _, held = outliers
    config = METHODS["balanced_energy"].Config(
        head={"name": "linear_probe", "init": "text"},
        alpha=2.0,
        gamma=1.0,
        training={"epochs": 2, "batch_size": 16, "lr": 0.05},
    )
    data = dataclasses.replace(toy_data(), templates=TEMPLATES, outliers=held)
    counts = np.asarray(counted_in_a_loop(held))
    ways = [data, dataclasses.replace(data, outlier_counts=counts)]
    ways.append(dataclasses.replace(data, outlier_counts=counts[::-1].copy()))
    with torch.random.fork_rng():
        results = [train_in_process(TrainingJob(config, 0), way, small_clip()) for way in ways]
    held_files, pass_files, other_files = (r.last.files() for r in results)
    assert held_files == pass_files
    assert held_files != other_files
