"""Sweeps on a real Ray: what fails and is killed, what is stopped, proposed and cut off by time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.methods import METHODS, MethodConfig
from pipelines.sweep import stage as sweep
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import SweepResult
from tests.barrier import wait_until
from tests.patience import PATIENCE
from tests.ray.processes import kill
from tests.sweep.toy import sets  # noqa: F401 - the fixture

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
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


# A trial takes the whole cluster. Schedulers compare a trial with those before it: which they are
# must not depend on whose process starts first.
IN_TURN = ComputeConfig(trial_cpus=4)


def run(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
    epochs: int = 2,
    methods: Mapping[str, MethodConfig] | None = None,
    storage: Storage | None = None,
    compute: ComputeConfig | None = None,
    **settings: Any,
) -> SweepResult:
    config = SweepConfig(posthoc={"budget": 4}, **settings)
    inputs = inputs_of(sets, backbone, methods or {"coop": coop(epochs)}, storage)
    return sweep.run(inputs, config, compute=compute or ComputeConfig())[0]


def inputs_of(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
    methods: Mapping[str, MethodConfig],
    storage: Storage | None = None,
) -> sweep.Inputs:
    storage = storage or next(iter(sets.caches.values())).storage
    return sweep.Inputs(methods, ("mcm", "energy"), sets, backbone, storage)


def statuses(found: SweepResult) -> list[str]:
    return [trial.status for trial in found.trials]


@dataclass(frozen=True)
class NotingStorage(Storage):
    """Notes which process asks for which trial's record, as every worker does at first."""

    notes: str = ""

    def exists(self, *parts: str) -> bool:
        if parts[:2] == ("cache", "trials"):
            with Path(self.notes).open("a") as file:
                file.write(f"{os.getpid()} {parts[-1]}\n")
        return super().exists(*parts)

    def workers(self, trial: str) -> list[int]:
        """The processes, other than this one, that began that trial."""
        lines = [line.split() for line in Path(self.notes).read_text().splitlines()]
        return [int(pid) for pid, of in lines if of == trial and int(pid) != os.getpid()]

    def trials(self) -> set[str]:
        """The trials that were begun."""
        return {line.split()[1] for line in Path(self.notes).read_text().splitlines()}

    def records(self) -> set[str]:
        """The trials that are finished."""
        names = self.names("cache", "trials")
        return {name for name in names if not name.startswith(".")}


@contextmanager
def killing_the_endless_trial(storage: NotingStorage, others: int, times: int) -> Iterator[None]:
    """Kills the worker of the trial that never ends, again and again, once all others are done."""

    def watch() -> None:
        wait_until(lambda: len(storage.records()) == others)
        wait_until(lambda: len(storage.trials()) == others + 1)
        (endless,) = storage.trials() - storage.records()
        killed: set[int] = set()
        for _ in range(times):
            wait_until(lambda: bool({*storage.workers(endless)} - killed))
            (pid,) = {*storage.workers(endless)} - killed
            kill(pid)
            killed.add(pid)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive(), "the endless trial was not killed that often"


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_worker_is_a_failed_trial_and_the_rest_goes_on(
    sets: FeatureSets,  # noqa: F811
    backbone: BackboneConfig,
    tmp_path: Path,
) -> None:
    # One training would take hours; its worker is killed, and so is the one that tries again.
    storage = NotingStorage(str(tmp_path / "storage"), notes=str(tmp_path / "notes"))
    Path(storage.notes).touch()
    space = {"coop": {"training.epochs": [2, 3, 10_000_000, 4]}}
    with killing_the_endless_trial(storage, others=3, times=2):
        found = run(sets, backbone, space=space, storage=storage)
    assert statuses(found) == ["done", "done", "failed", "done"]
    assert "the worker was killed" in str(found.trials[2].reason)
    assert found.methods["coop"].chosen["training.epochs"] in (2, 3, 4)


@pytest.mark.slow
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
        grace_epochs=1, objectives=["accuracy"], compute=IN_TURN,
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
        grace_epochs=1, objectives=["accuracy"], compute=IN_TURN,
    )  # fmt: skip
    assert "failed" not in statuses(found)
    # The three that hardly learn come last, below the median of those before them.
    assert "stopped" in statuses(found)[3:]
    chosen = found.methods["coop"].trial
    assert chosen is not None
    assert found.trials[chosen].status == "done"


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [["accuracy", "fpr"], ["auroc"]])
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
