"""Networks on Ray Train against the same loop in this process: equal to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.train import cache, prior
from pipelines.train.stage import train
from tests.train.test_stage import NEW, WORK, small_data


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_one_ray_train_worker_gives_the_bytes_of_the_same_loop_in_process(tmp_path: Path) -> None:
    on_ray, here = Storage(str(tmp_path / "ray")), Storage(str(tmp_path / "here"))
    jobs, seen = [WORK, replace(WORK, seed=1)], []
    places = train(
        jobs, small_data(), on_ray, compute=ComputeConfig(),
        on_report=lambda job, report: seen.append((job.seed, report["epoch"])),
    )  # fmt: skip
    again = train(jobs, small_data(), here, compute=ComputeConfig(), mode="in_process")
    assert places == again
    for place in places:
        file = ("cache", "networks", place, cache.WEIGHTS)
        assert on_ray.read_bytes(*file) == here.read_bytes(*file)
        assert cache.entry(on_ray, place).read() == cache.entry(here, place).read()
    assert seen == [(seed, float(epoch)) for seed in (0, 1) for epoch in (1, 2)]


@pytest.mark.usefixtures("ray_cluster")
def test_outliers_are_counted_by_class_with_ray_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "here"))
    (place,) = train([WORK], small_data(), storage, compute=ComputeConfig(), mode="in_process")
    backbone = cache.trained_backbone(NEW, place, storage, "trained")
    data, counted = small_data(), []
    assert data.outliers is not None
    monkeypatch.setattr(prior, "AT_ONCE", 2)  # five outliers in three parts
    for name, with_ray in (("ray", True), ("here", False)):
        kept = Storage(str(tmp_path / f"counts of {name}"))
        counts = prior.measure(
            data.outliers, data.address, data.class_names, backbone, kept, with_ray=with_ray
        )
        counted.append(counts.tolist())
    assert counted[0] == counted[1]
    assert sum(counted[0]) == 5
