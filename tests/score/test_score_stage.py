"""Tables of scores: found by what decides them, complete or refused, with Ray or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.code_digest import Code
from pipelines.config import UserError
from pipelines.data import kept
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.kept import Damaged
from pipelines.data.storage import Storage
from pipelines.heads import Predictor
from pipelines.records import HeadKey
from pipelines.score import stage as score
from pipelines.score.judge import judge
from pipelines.score.result import HeadScores, ScoreResult
from tests.feature_cache import flip_a_byte, make_cache
from tests.feature_sets import clustered_sets
from tests.stored_heads import publish_head

SCORES = {"mcm": {"tau": 0.3}, "delta_energy": {"tau": 0.5, "c": 2}}
FIRST, SECOND = (HeadKey(method="m", seed=seed) for seed in (0, 1))


def store_head(storage: Storage, address: str, seed: int = 0) -> Predictor:
    random = np.random.default_rng(seed)
    text = random.normal(size=(3, 16)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    head = Predictor("zero_shot", {"text_features": text}, {}, 10.0, ("cat", "dog", "cow"))
    publish_head(storage, address, head)
    return head


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def sets(storage: Storage) -> FeatureSets:
    return clustered_sets(storage)


def heads(storage: Storage) -> list[HeadScores]:
    for number, address in enumerate(("one", "two")):
        store_head(storage, address, number)
    return [
        HeadScores(key=FIRST, address="one", scores=SCORES),
        HeadScores(key=SECOND, address="two", scores={"mcm": {"tau": 0.3}}),
    ]


def files(storage: Storage, place: str) -> dict[str, tuple[int, bytes]]:
    paths = storage.local("cache", "scores", place).glob("*.parquet")
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def test_every_image_of_the_scored_sets_has_the_scores_of_judge(
    storage: Storage, sets: FeatureSets
) -> None:
    judges, seen = heads(storage), []
    result = score.run(judges, sets, storage, with_ray=False, on_progress=lambda *n: seen.append(n))
    assert seen == [(n, 8) for n in range(9)]  # four sets of two sources each, one shard a source
    tables = score.read_all(storage, result)
    assert list(tables) == [FIRST, SECOND]
    for key, head in zip(tables, judges, strict=True):
        table = tables[key].to_pydict()
        assert set(table["set"]) == {"validation", "test", "validation_ood/a", "ood/near/y"}
        known = score.load_predictor(storage, head.address)
        for name in set(table["set"]):
            loaded = sets.load(name)
            order = np.argsort(loaded.keys)
            rows = [n for n, found in enumerate(table["set"]) if found == name]
            assert [table["key"][n] for n in rows] == sorted(loaded.keys)
            assert [table["label"][n] for n in rows] == loaded.labels[order].tolist()
            judged = judge(known, head.scores, loaded.features[order])
            for column, values in judged.items():
                np.testing.assert_array_equal(np.asarray(table[column])[rows], values)
    assert [head.rows for head in result.heads] == [78, 78]
    assert ScoreResult.from_json(result.to_json(), "score.json") == result


@pytest.mark.usefixtures("ray_cluster")
def test_ray_writes_the_same_tables(storage: Storage, sets: FeatureSets, tmp_path: Path) -> None:
    here = score.run(heads(storage), sets, storage, with_ray=False)
    other = Storage(str(tmp_path / "other"))
    again = score.run(heads(other), sets, other)
    assert again == here
    for head in here.heads:
        one, two = (files(place, head.address) for place in (storage, other))
        assert {n: c for n, (_, c) in one.items()} == {n: c for n, (_, c) in two.items()}


def test_a_damaged_shard_of_features_is_refused(storage: Storage, sets: FeatureSets) -> None:
    """It used to be read around the checksum: a table of wrong scores, and no word."""
    shard = sets.caches["test-two"]
    flip_a_byte(shard, float(shard.load(["test-two/05"])[0, 0]))
    with pytest.raises(
        UserError, match=r"test-two/00000\.parquet: not the bytes that were written"
    ):
        score.run(heads(storage), sets, storage, with_ray=False)


def test_a_restart_makes_only_the_parts_that_are_missing(
    storage: Storage, sets: FeatureSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score.run(heads(storage), sets, storage, with_ray=False)
    place, other = (head.address for head in whole.heads)
    before = files(storage, place)
    lost = sorted(before)[3]
    for name in (lost, "manifest.json"):
        storage.local("cache", "scores", place, name).unlink()
    judged = []
    monkeypatch.setattr(score, "judge", lambda *a: judged.append(a[0]) or judge(*a))
    assert score.run(heads(storage), sets, storage, with_ray=False) == whole
    assert len(judged) == 1
    after = files(storage, place)
    assert {n for n in before if before[n] != after[n]} == {lost}
    assert after[lost][1] == before[lost][1]
    assert score.run(heads(storage), sets, storage, with_ray=False) == whole  # found as a whole
    assert len(judged) == 1
    assert len(files(storage, other)) == 8


def test_after_an_edit_no_part_of_the_earlier_code_is_taken(
    storage: Storage, sets: FeatureSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was killed, the code was changed, and the run was started again."""
    old = score.run(heads(storage)[:1], sets, storage, with_ray=False).heads[0].address
    lost = sorted(files(storage, old))[0]
    for name in (lost, "manifest.json"):
        storage.local("cache", "scores", old, name).unlink()

    def edited(*given: object) -> dict[str, np.ndarray]:
        return {name: -values for name, values in judge(*given).items()}

    monkeypatch.setattr(score, "judge", edited)
    monkeypatch.setattr(score, "score_code", lambda *_: Code({"edited": "1"}, {}))
    new = score.run(heads(storage)[:1], sets, storage, with_ray=False).heads[0].address
    assert new != old
    assert (score.read(storage, new)["score_mcm"].to_numpy() < 0).all()


def test_a_missing_part_is_an_error_and_never_a_smaller_table(
    storage: Storage, sets: FeatureSets
) -> None:
    place = score.run(heads(storage)[:1], sets, storage, with_ray=False).heads[0].address
    path = storage.local("cache", "scores", place, "test-two-00000.parquet")
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(Damaged, match=r"test-two-00000\.parquet: missing"):
        score.read(storage, place)
    path.write_bytes(content)
    table = storage.read_table("cache", "scores", place, path.name)
    for other in (table.slice(1), pa.concat_tables([table, table])):
        kept.write_table(storage, other, "cache", "scores", place, path.name)
        with pytest.raises(Damaged, match="not the bytes that were written"):
            score.read(storage, place)
    with pytest.raises(Damaged, match=r"nothing/manifest\.json: missing"):
        score.read(storage, "nothing")


def test_an_image_that_has_neither_feature_nor_rejection_is_an_error(
    storage: Storage, sets: FeatureSets
) -> None:
    chosen = sets.benchmark.sets["test"]
    more = Selection((*chosen.sources, "test-one"), (*chosen.keys, "lost"), (*chosen.labels, 0))
    every = {**sets.benchmark.sets, "test": more}
    benchmark = Benchmark("toy", sets.benchmark.class_names, ("{}",), "", {}, every, "")
    with pytest.raises(UserError, match="78 images were scored, and 79 have a feature"):
        score.run(heads(storage), FeatureSets(benchmark, sets.caches), storage, with_ray=False)


def test_heads_that_share_everything_share_a_table(storage: Storage, sets: FeatureSets) -> None:
    first = heads(storage)[0]
    default = HeadKey(method="m", seed=0, variant="default")
    twice = [first, first.model_copy(update={"key": default})]
    result = score.run(twice, sets, storage, with_ray=False)
    assert len({head.address for head in result.heads}) == 1
    assert len(storage.names("cache", "scores")) == 1
    assert list(score.read_chosen(storage, result)) == [("m", 0)]
    table = score.entry(storage, result.heads[0].address).read()
    assert sum(table.parts.values()) == table.rows == 78


def test_the_address_of_a_table_follows_everything_that_decides_it(
    storage: Storage, sets: FeatureSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = heads(storage)[0]
    others = [
        first.model_copy(update={"address": "two"}),
        first.model_copy(update={"scores": {**SCORES, "mcm": {"tau": 0.4}}}),
        first.model_copy(update={"scores": {"mcm": SCORES["mcm"]}}),
        first.model_copy(update={"fitted": {"knn": "abc"}}),
    ]
    known = score.address(first, sets, storage)
    assert score.address(first.model_copy(update={"key": SECOND}), sets, storage) == known
    assert len({known, *(score.address(head, sets, storage) for head in others)}) == 5
    test = sets.benchmark.sets["test"]
    fewer = Selection(test.sources[1:], test.keys[1:], test.labels[1:])
    every = {**sets.benchmark.sets, "test": fewer}
    benchmark = Benchmark("toy", sets.benchmark.class_names, ("{}",), "", {}, every, "")
    assert score.address(first, FeatureSets(benchmark, sets.caches), storage) != known
    swapped = {**sets.caches, "test-one": make_cache(storage, "else", {"k": [0.5] * 16})}
    assert score.address(first, FeatureSets(sets.benchmark, swapped), storage) != known
    # What trains is no part of it: nothing of it is scored.
    train = {**sets.caches, "train-one": swapped["test-one"]}
    assert score.address(first, FeatureSets(sets.benchmark, train), storage) == known
    monkeypatch.setattr(score, "score_code", lambda *_: Code({}, {}))
    assert score.address(first, sets, storage) != known
