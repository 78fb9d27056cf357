"""The long-tailed benchmarks on the reference data: how many images of which class, and which."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from pipelines.config import load
from pipelines.data.benchmarks import Benchmark, open_benchmark
from pipelines.settings.config import PipelineConfig

RATIO = 0.01


def opened(name: str, shared: Path, *, is_whole: bool = False) -> Benchmark:
    words = [f"benchmark={name}", f"benchmark.root={shared}/data", "shots=null", "sweep=none"]
    config = load(PipelineConfig, "pipeline", words).benchmark
    return open_benchmark(config, imbalance=None if is_whole else config.imbalance)


def counts(benchmark: Benchmark) -> list[int]:
    found = Counter(benchmark.sets["train"].labels)
    return [found[label] for label in range(len(benchmark.class_names))]


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10_lt", 10), ("cifar100_lt", 100)])
def test_the_tail_falls_by_the_published_ratio(name: str, num_classes: int, shared: Path) -> None:
    if not (shared / "data" / f"{name.removesuffix('_lt')}.parquet").exists():
        pytest.skip(f"no {name} at {shared}")
    tail = opened(name, shared)
    found = counts(tail)
    assert len(found) == num_classes
    # n_max is the largest for which every class has enough; the first class has it rounded down.
    for place, count in enumerate(found):
        share = RATIO ** (place / (num_classes - 1))
        low, high = (math.floor(n_max * share + 1e-9) for n_max in (found[0], found[0] + 1))
        assert max(1, low) <= count <= max(1, high)
    assert found == sorted(found, reverse=True)
    # The same images every time, out of those of the whole set; the other sets stay whole.
    assert opened(name, shared).sets["train"].keys == tail.sets["train"].keys
    assert len(set(tail.sets["train"].keys)) == sum(found)
    whole = opened(name, shared, is_whole=True)
    assert set(tail.sets["train"].keys) < set(whole.sets["train"].keys)
    for other in ("test", "validation", "outliers"):
        assert whole.sets[other].keys == tail.sets[other].keys
