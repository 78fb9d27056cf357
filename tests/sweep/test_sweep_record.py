"""What a run keeps of its sweep: files, and MLflow's runs below the run's own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pipelines.sweep import record as sweep_record
from pipelines.sweep import surfaces as sweep_surfaces
from tests.sweep_record import failed, record, result

RUNS = itertools.count()


@pytest.fixture
def run(mlflow_store: Any) -> Any:
    """As much of a run as its sweep's record asks of it."""
    number = next(RUNS)
    with mlflow_store.tracker.run(f"sweep record {number}") as active:
        pass
    return sweep_record.Place(
        mlflow_store.storage, f"run{number}", mlflow_store.tracker, active.run_id
    )


@pytest.mark.slow
def test_files_and_what_the_parent_run_has(run: Any) -> None:
    sweep, surfaces = record()
    sweep_record.keep(run, sweep, surfaces, "benchmark=digits")
    assert sweep_surfaces.read_surfaces(run.storage, run.run).equals(surfaces)
    folder = Path(run.storage.root, "runs", run.run)
    assert {path.name for path in (folder / "best").iterdir()} == {"coop.yaml", "ebm.yaml"}
    pictures = {path.name for path in (folder / "sweep").glob("*.png")}
    assert {"parallel-ebm.png", "surface-ebm-delta_energy.png", "pareto.png"} <= pictures
    assert len(run.storage.read_json("runs", run.run, "sweep", "evidence.json")["importance"]) == 4
    kept = run.tracker.client.get_run(run.tracking_run)
    assert kept.data.tags["chosen.ebm.delta_energy.tau"] == "0.48"
    assert kept.data.tags["chosen.coop.training.lr"] == "0.1"
    assert kept.data.metrics["importance/coop/training/training.epochs"] == pytest.approx(0.8)
    files = run.tracker.client.list_artifacts(run.tracking_run, "sweep")
    assert {Path(file.path).name for file in files} == pictures


def test_every_trial_is_a_child_run_once(run: Any) -> None:
    sweep, _ = record()
    for _ in range(2):  # as after a restart
        run.tracker.log_children(sweep_record.children(sweep), run.tracking_run)
    client = run.tracker.client
    query = f"tags.`mlflow.parentRunId` = '{run.tracking_run}'"
    found = {r.info.run_name: r for r in client.search_runs([run.tracker.experiment_id], query)}
    names = {f"sweep {t.method} {t.trial}" for t in sweep.trials}
    assert set(found) == names
    assert len(client.search_runs([run.tracker.experiment_id], query)) == len(names)
    one, entry = found["sweep ebm 3"], next(
        t for t in sweep.trials if (t.method, t.trial) == ("ebm", 3)
    )  # fmt: skip
    assert one.info.status == "FINISHED"
    assert one.data.params == {"method": "ebm", **{k: str(v) for k, v in entry.settings.items()}}
    assert one.data.metrics["validation/accuracy"] == entry.accuracy
    assert one.data.metrics["validation/auroc/mcm"] == entry.scores["mcm"].auroc
    assert one.data.metrics["validation/fpr/delta_energy"] == entry.scores["delta_energy"].fpr
    assert one.data.metrics["best/delta_energy/tau"] == 0.5
    assert one.info.end_time - one.info.start_time == 2000
    failed, stopped = found["sweep ebm 59"], found["sweep ebm 57"]
    assert (failed.info.status, stopped.info.status) == ("FAILED", "KILLED")
    assert failed.data.tags["trial.reason"] == "the loss became NaN in epoch 2"
    assert stopped.data.tags["trial.status"] == "stopped"
    assert failed.data.metrics == {}


def test_a_trial_that_failed_and_then_succeeded_is_finished(run: Any) -> None:
    sweep, _ = record()
    first = sweep.of("coop")
    broken = [failed("coop", 0, first[0].settings, "worker killed"), *first[1:]]
    for trials in (broken, first):
        children = sweep_record.children(result(sweep.methods, trials))
        run.tracker.log_children(children, run.tracking_run)
    query = f"tags.`mlflow.parentRunId` = '{run.tracking_run}'"
    found = run.tracker.client.search_runs([run.tracker.experiment_id], query)
    assert len(found) == len(first)
    assert {r.info.status for r in found} == {"FINISHED"}
    (one,) = [r for r in found if r.info.run_name == "sweep coop 0"]
    assert one.data.metrics["validation/auroc/mcm"] == first[0].scores["mcm"].auroc


def test_without_trials_there_are_only_the_configurations(run: Any) -> None:
    sweep, _ = record()
    sweep_record.keep(run, result(sweep.methods, []), None, "benchmark=digits")
    assert run.storage.names("runs", run.run) == ["best"]
