"""Sweeps on a real Ray: what fails and is killed, what is stopped, proposed and cut off by time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.backbones.clip import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.methods import METHODS, MethodConfig
from pipelines.sweep import stage as sweep
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import SweepResult
from tests.ray.processes import descendants, kill, title
from tests.sweep.test_sweep import sets  # noqa: F401 - the fixture

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    config, path = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(config), path=str(path))


def coop(epochs: int = 2) -> MethodConfig:
    config: MethodConfig = METHODS["coop"].Config(
        training={"epochs": epochs, "batch_size": 9, "warmup_epochs": 0, "lr": 0.05},
        head={"name": "coop", "num_context": 2},
    )
    return config


def run(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
    epochs: int = 2,
    methods: Mapping[str, MethodConfig] | None = None,
    **settings: Any,
) -> SweepResult:
    config = SweepConfig(posthoc={"budget": 4}, **settings)
    inputs = inputs_of(sets, backbone, methods or {"coop": coop(epochs)})
    return sweep.run(inputs, config, compute=ComputeConfig())[0]


def inputs_of(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
    methods: Mapping[str, MethodConfig],
) -> sweep.Inputs:
    storage: Storage = next(iter(sets.caches.values())).storage
    return sweep.Inputs(methods, ("mcm", "energy"), sets, backbone, storage)


def statuses(found: SweepResult) -> list[str]:
    return [trial.status for trial in found.trials]


@contextmanager
def killing_workers_from(seconds: float, until: float) -> Iterator[list[int]]:
    """Kills every worker that runs a trial for longer than that, again and again."""
    killed: list[int] = []
    stopped = threading.Event()
    seen: dict[int, float] = {}

    def watch() -> None:
        limit = time.monotonic() + until
        while not stopped.is_set() and time.monotonic() < limit:
            for pid in trial_workers():
                began = seen.setdefault(pid, time.monotonic())
                if time.monotonic() - began > seconds:
                    kill(pid)
                    killed.append(pid)
                    del seen[pid]
            time.sleep(0.1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        stopped.set()
        thread.join()


def trial_workers() -> list[int]:
    """Processes of Ray's below this one that run trials."""
    return [pid for pid in descendants(os.getpid()) if "ImplicitFunc" in title(pid)]


@pytest.mark.slow
def test_a_killed_worker_is_a_failed_trial_and_the_rest_goes_on(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
) -> None:
    # One training would take hours; its worker is killed, and so is the one that tries again.
    space = {"coop": {"training.epochs": [2, 3, 10_000_000, 4]}}
    with killing_workers_from(12.0, until=200.0) as killed:
        found = run(sets, backbone, space=space)
    assert len(killed) == 2
    assert statuses(found) == ["done", "done", "failed", "done"]
    assert "the worker was killed" in str(found.trials[2].reason)
    assert found.methods["coop"].chosen["training.epochs"] in (2, 3, 4)


def test_a_failing_setting_stops_nothing(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
) -> None:
    notes: list[str] = []
    config = SweepConfig(posthoc={"budget": 4}, space={"coop": {"training.lr": [0.05, 1e30, 0.02]}})
    found, _ = sweep.run(
        inputs_of(sets, backbone, {"coop": coop()}),
        config,
        compute=ComputeConfig(),
        on_progress=lambda done, total, note: notes.append(f"{done}/{total} {note}"),
    )
    assert statuses(found) == ["done", "failed", "done"]
    assert "try a smaller training.lr" in str(found.trials[1].reason)
    # The live view: what runs, what failed, the best so far.
    assert notes[0] == "0/3 trials"
    assert any("running" in note for note in notes)
    assert notes[-1].startswith("3/3 trials")
    assert "1 failed" in notes[-1]
    assert "best AUROC" in notes[-1]
    with pytest.raises(UserError, match=r"every trial of coop failed \(1\).*1e\+30"):
        run(sets, backbone, space={"coop": {"training.lr": [1e30]}})


@pytest.mark.slow
def test_asha_stops_the_weak_early(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
) -> None:
    lrs = [0.05, 1e-9, 2e-9, 3e-9, 4e-9, 5e-9]
    found = run(
        sets, backbone, epochs=9, space={"coop": {"training.lr": lrs}}, scheduler="asha",
        grace_epochs=1, objectives=["accuracy"],
    )  # fmt: skip
    assert {"done", "stopped"} == set(statuses(found))
    stopped = [t for t in found.trials if t.status == "stopped"]
    assert all(str(t.reason).startswith("stopped after epoch") for t in stopped)
    assert all(t.accuracy is not None and 0 <= t.accuracy <= 1 for t in stopped)
    # A stopped trial is never the choice, whatever its figures.
    chosen = found.methods["coop"].trial
    assert chosen is not None
    assert found.trials[chosen].status == "done"
    assert found.methods["coop"].scores.keys() == {"mcm", "energy"}


@pytest.mark.slow
def test_the_median_rule_ends_with_a_finished_choice(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
) -> None:
    lrs = [0.05, 0.04, 0.03, 1e-9, 2e-9, 3e-9]
    found = run(
        sets, backbone, epochs=9, space={"coop": {"training.lr": lrs}}, scheduler="median",
        grace_epochs=1, objectives=["accuracy"],
    )  # fmt: skip
    assert "failed" not in statuses(found)
    # The three that hardly learn come last, below the median of those before them.
    assert "stopped" in statuses(found)[3:]
    chosen = found.methods["coop"].trial
    assert chosen is not None
    assert found.trials[chosen].status == "done"


@pytest.mark.parametrize(
    "objectives", [["accuracy", "fpr"], pytest.param(["auroc"], marks=pytest.mark.slow)]
)
def test_optuna_proposes_settings_of_the_space(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
    objectives: list[str],
) -> None:
    margins = METHODS["energy_margin"].Config(
        training={"epochs": 1, "batch_size": 9, "warmup_epochs": 0, "lr": 0.05},
        head={"name": "clip_adapter"},
    )
    space = {
        "m_in": {"uniform": [-15.0, -5.0]},
        "m_out": {"uniform": [-15.0, -5.0]},
        "training.lr": {"loguniform": [1e-3, 1e-1]},
    }
    found = run(
        sets, backbone, methods={"energy_margin": margins}, sampler="optuna", num_samples=5,
        space={"energy_margin": space}, objectives=objectives, seed=3,
    )  # fmt: skip
    assert statuses(found) == ["done"] * 5
    tried = [t.settings for t in found.trials]
    assert len({tuple(v.values()) for v in tried}) == 5
    assert all(-15 <= v["m_in"] < v["m_out"] <= -5 for v in tried)
    assert all(1e-3 <= v["training.lr"] <= 1e-1 for v in tried)


@pytest.mark.slow
def test_when_the_time_is_up_what_is_done_counts(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
) -> None:
    space = {"coop": {"training.epochs": [2, 10_000_000]}}
    found = run(sets, backbone, space=space, time_budget_s=10.0)
    assert statuses(found) == ["done", "failed"]
    assert found.trials[1].reason == "not run: the sweep's time was up"
    assert found.methods["coop"].chosen == {"training.epochs": 2}
