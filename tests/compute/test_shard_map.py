"""One pass over shards: results in order, bounded, the same with and without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pipelines.compute import shard_map
from pipelines.compute.shard_map import map_shards
from pipelines.config import UserError


def tenfold(shard: int, shared: dict[int, float]) -> tuple[int, str]:
    time.sleep(shared.get(shard, 0.0))
    return 10 * shard, f"shard {shard}"


def refuse(shard: int, shared: str) -> int:
    if shard == 2:
        raise UserError(f"{shared}: shard {shard} is damaged")
    return shard


def test_without_ray_a_shard_is_done_when_its_result_is_asked_for() -> None:
    done = []

    def note(shard: int, _: None) -> int:
        done.append(shard)
        return shard

    results = map_shards(note, [3, 1, 2], None, with_ray=False)
    assert done == []
    assert next(results) == 3
    assert done == [3]
    assert list(results) == [1, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_the_same_in_the_same_order_whichever_task_ends_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_map, "WINDOW", 3)
    shards = [5, 0, 4, 1, 2, 6, 3]
    slow = {5: 0.5, 2: 0.3}  # the first of the first and the second of the second window
    here = list(map_shards(tenfold, shards, {}, with_ray=False))
    assert list(map_shards(tenfold, shards, slow, with_ray=True)) == here
    assert list(map_shards(tenfold, shards, {}, with_ray=True, at_once=1)) == here
    assert here[0] == (50, "shard 5")
    assert list(map_shards(tenfold, [], {}, with_ray=True)) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_users_error_of_a_task_is_one_line_here() -> None:
    for with_ray in (False, True):
        with pytest.raises(UserError, match=r"^features a: shard 2 is damaged$"):
            list(map_shards(refuse, [1, 2, 3], "features a", with_ray=with_ray))


def test_no_more_than_a_window_of_results_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are asked for one after the other, each when the one before is used up."""
    monkeypatch.setattr(shard_map, "WINDOW", 2)
    asked: list[list[int]] = []

    def window(shards: list[int], *_: object) -> Iterator[tuple[int, int]]:
        asked.append(list(shards))
        yield from reversed(list(enumerate(shards)))

    monkeypatch.setattr(shard_map, "_window", window)
    monkeypatch.setattr("ray.put", lambda _: None)
    results = map_shards(refuse, [7, 8, 9], "", with_ray=True)
    assert [next(results), next(results)] == [7, 8]
    assert asked == [[7, 8]]
    assert list(results) == [9]
    assert asked == [[7, 8], [9]]
