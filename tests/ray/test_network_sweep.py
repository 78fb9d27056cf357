"""Training settings of networks on a real Ray: through the whole pipeline, and stopped early."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ray import cloudpickle

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.score.config import PostHocConfig
from pipelines.sweep import network_trial
from pipelines.sweep import networks as sweep
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.network_trial import Labelled, NetworkShared
from pipelines.sweep.networks import NetworkInputs
from pipelines.sweep.trial import Follow
from pipelines.train import cache
from pipelines.train.image_set import images_of
from pipelines.train.stage import train
from tests.ray.commands import job_here
from tests.ray.test_network_run import words  # noqa: F401 - the fixture
from tests.sweep import network_toy
from tests.sweep.network_toy import toy_inputs

cloudpickle.register_pickle_by_value(network_toy)  # workers cannot import these
cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]

POSTHOC, EPOCHS = {"budget": 4}, 4
M_IN, M_OUT = (-4.0, -3.0, -2.0), (-1.5, -0.5)
SEARCH = [
    "methods=[classifier,network_energy]", "sweep=posthoc", "sweep.posthoc.budget=4",
    f"sweep.space.network_energy={{m_in: {list(M_IN)}, m_out: {list(M_OUT)}}}",
]  # fmt: skip


def asked(words: list[str], *more: str) -> list[str]:  # noqa: F811
    other = ("methods", "sweep", "backbone.", "methods.network_outlier_exposure")
    kept = [w for w in words if not w.startswith(("methods=", "sweep=", *other[3:]))]
    return [*kept, *SEARCH, *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def content(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_chosen_setting_is_trained_for_all_seeds_and_nothing_twice(
    words: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    done = job_here("pipeline", *asked(words))
    assert done.returncode == 0, done.stdout + done.stderr
    storage = tmp_path / "storage"
    (run,) = (storage / "runs").iterdir()
    stage, swept = read(run / "train.json"), read(run / "sweep.json")
    trials = stage["swept"]["trials"]
    pairs = [(t["settings"]["m_in"], t["settings"]["m_out"]) for t in trials]
    assert pairs == [(a, b) for a in M_IN for b in M_OUT]
    assert {t["status"] for t in trials} == {"done"}
    assert {frozenset(t["scores"]) for t in trials} == {frozenset({"msp", "energy"})}

    # The choice, by the rule, is what both seeds are trained with; that of seed 0 was there.
    floor = max(t["accuracy"] for t in trials) - swept["accuracy_tolerance"]
    best = max(
        (t for t in trials if t["accuracy"] >= floor), key=lambda t: t["scores"]["energy"]["auroc"]
    )
    manifests = {
        p.parent.name: read(p) for p in (storage / "cache" / "networks").glob("*/manifest.json")
    }
    assert len(manifests) == len(trials) + 1
    for network in stage["networks"]:
        record = manifests[network["address"]]
        assert record["seed"] == network["key"]["seed"]
        assert {k: record["setting"][k] for k in best["settings"]} == best["settings"]

    # The sweep says so: trials, the choice, the winner's file, pictures.
    chosen = swept["methods"]["network_energy"]
    assert (chosen["trial"], chosen["chosen"]) == (best["trial"], best["settings"])
    assert set(chosen["validation"]) == {"msp", "energy", "knn"}
    assert [t for t in swept["trials"] if t["method"] == "network_energy"] == trials
    again = yaml.safe_load((run / "best" / "network_energy.yaml").read_text())
    assert {k: again[k] for k in best["settings"]} == best["settings"]
    assert again["head"]["train"]["start"] == "backbone"
    pictures = {p.name for p in (run / "sweep").glob("*network_energy*.png")}
    assert {"parallel", "contour", "margins", "fpr", "surface"} <= {
        name.partition("-")[0] for name in pictures
    }
    rows = pq.read_table(run / "surfaces.parquet").to_pylist()
    assert {r["trial"] for r in rows if r["method"] == "network_energy"} == {best["trial"]}
    # Its default would be another network: of it there is no comparison.
    compared = read(run / "metrics.json")["best_against_default"]
    assert {row["method"] for row in compared} <= {"classifier"}

    # The same command finds everything, and so do the trials of another run.
    before = content(storage / "cache" / "networks") | content(storage / "cache" / "trials")
    found = job_here("pipeline", *asked(words))
    assert found.stdout.count("found, nothing to do") == 7, found.stdout
    other = job_here("sweep", *asked(words, "seeds=1"))
    assert other.returncode == 0, other.stdout + other.stderr
    after = content(storage / "cache" / "networks") | content(storage / "cache" / "trials")
    assert after == before


def after_one_epoch(inputs: NetworkInputs, rate: float, storage: Storage) -> float:
    """The criterion's AUROC of a training that is left after its first epoch."""

    class Left(Exception):
        pass

    def leave(_: int, follow: Follow) -> None:
        raise Left(follow("energy")[1].auroc)

    shared = NetworkShared(
        jobs=inputs.jobs, data=inputs.data, judged_on="validation_ood", storage=storage,
        validation=Labelled(*images_of(inputs.benchmark, "validation", inputs.tables)),
        ood={
            name: Labelled(*images_of(inputs.benchmark, name, inputs.tables))
            for name in inputs.benchmark.names("validation_ood")
        },
        scores=("energy",), posthoc=PostHocConfig(**POSTHOC),
    )  # fmt: skip
    job = inputs.jobs["tuned"]
    training = job.method.training.model_copy(update={"epochs": EPOCHS, "lr": rate})
    with pytest.raises(Left) as left:
        network_trial.trial(
            job.method.model_copy(update={"training": training}), job, shared, leave
        )
    return float(left.value.args[0])


def test_a_scheduler_stops_networks_and_what_is_chosen_was_finished(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "outputs"))
    inputs = toy_inputs(storage)
    # One after the other, the best of the first epoch first: the next are worse, and stopped.
    apart = Storage.open(str(tmp_path / "apart"))
    aurocs = {rate: after_one_epoch(inputs, rate, apart) for rate in (0.2, 0.02, 0.01)}
    assert len(set(aurocs.values())) == 3
    settings = SweepConfig(
        posthoc=POSTHOC, scheduler="asha", grace_epochs=1,
        space={"tuned": {
            "training.epochs": [EPOCHS],
            "training.lr": sorted(aurocs, key=lambda rate: -aurocs[rate]),
        }},
    )  # fmt: skip
    found = sweep.run(inputs, settings, compute=ComputeConfig(trial_cpus=4))
    assert [t.status for t in found.trials] == ["done", "stopped", "stopped"]
    stopped = [t for t in found.trials if t.status == "stopped"]
    assert {t.reason for t in stopped} == {"stopped after epoch 1"}
    assert [t.scores["energy"].auroc for t in stopped] == sorted(aurocs.values(), reverse=True)[1:]
    chosen = found.methods["tuned"]
    assert chosen.trial == 0
    job = inputs.jobs["tuned"]
    method = job.method.model_copy(update={"training": chosen.setting.training})
    trained: list[float] = []
    (place,) = train(
        [type(job)(method, 0, job.backbone)], inputs.data, storage, compute=ComputeConfig(),
        mode="in_process", on_report=lambda _, report: trained.append(report["epoch"]),
    )  # fmt: skip
    assert trained == []
    assert len(cache.entry(storage, place).read().history) == EPOCHS


def test_optuna_proposes_settings_of_networks(tmp_path: Path) -> None:
    inputs = toy_inputs(Storage.open(str(tmp_path / "outputs")))
    space = {"m_in": {"uniform": [-5.0, -1.0]}, "m_out": {"uniform": [-5.0, -1.0]}}
    settings = SweepConfig(posthoc=POSTHOC, sampler="optuna", num_samples=3, space={"tuned": space})
    found = sweep.run(inputs, settings, compute=ComputeConfig())
    assert [t.status for t in found.trials] == ["done"] * 3
    tried = [t.settings for t in found.trials]
    assert len({tuple(v.values()) for v in tried}) == 3
    assert all(-5 <= float(str(v["m_in"])) < float(str(v["m_out"])) <= -1 for v in tried)
