from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.compute.stamp import stamp
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.store import tracker as tracking
from pipelines.store.tracker import open_tracker

ROOT = Path(__file__).parents[1]


def test_the_store_lies_below_the_storage_and_makes_no_noise(mlflow_store, tmp_path, monkeypatch):
    assert mlflow_store.said == ""
    root = Path(mlflow_store.storage.root)
    assert mlflow_store.tracker.uri == f"sqlite:///{root}/mlflow.db"
    assert (root / "mlflow.db").is_file()
    monkeypatch.chdir(tmp_path)
    with mlflow_store.tracker.run("somewhere else") as run:
        run.log_text("hello", "notes/hello.txt")
        (tmp_path / "figure.svg").write_text("<svg/>")
        run.log_artifact(tmp_path / "figure.svg", "figures")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"]
    kept = root / "artifacts" / run.run_id / "artifacts"
    assert (kept / "notes" / "hello.txt").read_text() == "hello"
    assert (kept / "figures" / "figure.svg").read_text() == "<svg/>"


def test_opening_again_finds_the_experiment(mlflow_store):
    again = open_tracker(mlflow_store.storage)
    assert again == mlflow_store.tracker


def test_a_run_keeps_parameters_metrics_and_tags(mlflow_store):
    tracker = mlflow_store.tracker
    with tracker.run("main", tags=stamp(run="abc")) as run:
        run.log_params({f"group.key {number}": number for number in range(250)})
        run.log_metrics({"coop/auroc/near (7 + 8)": 0.75, "loss": float("nan")}, step=3)
        run.log_metrics({f"many/{number}": number for number in range(1200)})
    kept = tracker.client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert len(kept.data.params) == 250
    assert kept.data.params["group.key 249"] == "249"
    assert kept.data.metrics["coop/auroc/near _7 _ 8_"] == 0.75
    assert kept.data.metrics["many/1199"] == 1199
    assert tracker.client.get_metric_history(run.run_id, "loss")[0].step == 3
    assert kept.data.tags["run"] == "abc"


def test_a_restart_goes_on_in_its_runs(mlflow_store):
    tracker = mlflow_store.tracker
    with tracker.run("parent") as parent:
        parent.log_params({"a": 1})
    with tracker.run("", run_id=parent.run_id) as again:
        again.log_params({"a": 1, "b": 2})
    assert again.run_id == parent.run_id
    kept = tracker.client.get_run(parent.run_id)
    assert (kept.info.run_name, kept.data.params) == ("parent", {"a": "1", "b": "2"})
    children = []
    for name in ("it's trial 1", "trial 2", "it's trial 1"):
        with tracker.run(name, parent=parent.run_id) as child:
            children.append(child.run_id)
    assert children[0] == children[2] != children[1]
    tag = tracker.client.get_run(children[0]).data.tags["mlflow.parentRunId"]
    assert tag == parent.run_id


def test_a_run_that_fails_or_is_stopped_says_so(mlflow_store):
    tracker, seen = mlflow_store.tracker, {}
    for error in (RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), tracker.run("bad") as run:
            raise error
        seen[type(error)] = tracker.client.get_run(run.run_id).info.status
    assert seen == {RuntimeError: "FAILED", KeyboardInterrupt: "KILLED"}


def test_an_unknown_or_deleted_run_is_a_users_mistake(mlflow_store):
    tracker = mlflow_store.tracker
    assert not tracker.has("0" * 32)
    with tracker.run("short-lived") as run:
        pass
    assert tracker.has(run.run_id)
    tracker.client.delete_run(run.run_id)
    with (
        pytest.raises(UserError, match=rf"no run {run.run_id}"),
        tracker.run("", run_id=run.run_id),
    ):
        pass


def test_a_store_that_cannot_be_opened_gives_one_message(tmp_path):
    with pytest.raises(UserError, match="give a server, tracking_uri=") as remote:
        open_tracker(Storage.open("memory://bucket/outputs"))
    assert "storage=memory://bucket/outputs" in str(remote.value)
    with pytest.raises(UserError, match=r"^MLflow store ftp://nowhere: ") as unknown:
        open_tracker(Storage.open(str(tmp_path)), tracking_uri="ftp://nowhere")
    assert len(str(unknown.value).splitlines()) == 1


def test_mlflows_current_store_is_left_as_it_was(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    ours, theirs = f"sqlite:///{tmp_path}/ours.db", f"sqlite:///{tmp_path}/theirs.db"
    for before in (None, theirs):
        mlflow.set_tracking_uri(before)
        with tracking.current_store(ours):
            assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == ours
        assert mlflow.is_tracking_uri_set() == (before is not None)
        assert os.environ.get("MLFLOW_TRACKING_URI") == before
        assert "MLFLOW_REGISTRY_URI" not in os.environ
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == theirs
    mlflow.set_tracking_uri(None)
