"""What a killed process leaves is swept at the next start; what belongs to a live one stays."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from pipelines.data.storage import Storage
from pipelines.store import processes
from pipelines.store.leases import at_work
from pipelines.store.processes import Process, this_process
from pipelines.store.registry import working
from pipelines.store.tracker import PROCESS, Tracker, open_tracker
from tests.barrier import wait_until
from tests.patience import PATIENCE
from tests.store.test_two_at_once import held, is_ready


def left(storage: Storage, tracker: Tracker) -> dict[str, set[str]]:
    """Whose things are there, by kind."""
    runs = tracker.client.search_runs([tracker.experiment_id], "attributes.status = 'RUNNING'")
    models = tracker.client.search_logged_models([tracker.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    temporary = Path(tempfile.gettempdir()).glob(f"{processes.PREFIX}*/*")
    return {
        "files": {p.name.split(".")[1] for p in storage.local("cache", "heads").glob(".*.tmp")},
        "ray": {p.name.removeprefix("train-") for p in storage.local("cache/ray_train").iterdir()},
        "runs": set(names.values()),
        "models": {names.get(model.source_run_id, "gone") for model in models},
        "folders": {p.name for p in temporary if p.name in ("killed", "live")},
    }


@pytest.mark.slow
def test_only_what_a_killed_process_left_is_swept(
    tmp_path: Path, backbone_files: dict[str, tuple[Path, Path]]
) -> None:
    storage = Storage.open(str(tmp_path / "storage"))
    tracker = open_tracker(storage)
    files, barrier = [str(path) for path in backbone_files["resnet"]], tmp_path / "barrier"
    killed = held("works", storage.local(), barrier, "killed", *files)
    try:
        wait_until(lambda: is_ready(killed, barrier, "killed"))
        live = held("works", storage.local(), barrier, "live", *files)
        try:
            wait_until(lambda: is_ready(live, barrier, "live"))
            assert set(map(frozenset, left(storage, tracker).values())) == {
                frozenset({"killed", "live"})
            }
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            with working(storage, None):
                assert set(map(frozenset, left(storage, tracker).values())) == {frozenset({"live"})}
            (barrier / "go").touch()
            live.communicate(timeout=PATIENCE)
        finally:
            live.kill()
            live.communicate()
    finally:
        killed.kill()
        killed.communicate()
    states = {r.info.run_name: r.info.status for r in tracker.client.search_runs(
        [tracker.experiment_id])}  # fmt: skip
    assert states["killed"] == "KILLED"
    assert len(list(storage.local("artifacts", "models").iterdir())) == 1  # live's
    assert list(storage.local("leases").iterdir()) == []


def test_a_live_process_of_another_machine_keeps_what_is_its_own(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    temporary = tmp_path / "cache" / ".head.json.0123abcd.tmp"
    temporary.parent.mkdir()
    temporary.touch()
    gone = this_process().model_copy(update={"pid": 2**22 + 1})
    other = gone.model_copy(update={"host": "another"})
    storage.write_bytes(other.to_json(), "leases", "2-00000000.json")
    storage.write_bytes(gone.to_json(), "leases", "1-00000000.json")
    os.utime(storage.local("leases", "2-00000000.json"), ns=(0, 1))  # at work since long ago
    with at_work(storage):
        assert temporary.exists()
        assert (
            storage.names("leases")[1:] == ["2-00000000.json"] or len(storage.names("leases")) == 2
        )
    storage.local("leases", "2-00000000.json").unlink()
    storage.write_bytes(gone.to_json(), "leases", "3-00000000.json")
    with at_work(storage):
        assert not temporary.exists()
    assert storage.names("leases") == []


def test_when_a_process_counts_as_gone() -> None:
    here = this_process()
    assert not here.is_gone

    def like(**more: object) -> Process:
        return here.model_copy(update=more)

    assert like(pid=2**22 + 1).is_gone
    assert like(started="1").is_gone  # its number was given to another one
    assert like(boot="before", machine=here.machine).is_gone == bool(here.machine)
    for other in ({"host": "another"}, {"machine": "another"}, {"namespace": "a container's"}):
        assert not like(pid=2**22 + 1, **other).is_gone


def test_one_that_ended_with_an_error_is_swept_at_the_next_start(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    swept = []
    try:
        with at_work(storage):
            raise RuntimeError
    except RuntimeError:
        (ended,) = storage.names("leases")
    assert ended.endswith(".json.ended")
    with at_work(storage, lambda: swept.append(True)):
        assert swept == [True]
    assert storage.names("leases") == []
    with at_work(storage, lambda: swept.append(True)):
        assert swept == [True]


def test_a_storage_behind_a_uri_closes_the_runs_of_killed_processes(tmp_path: Path) -> None:
    """It keeps no leases: each start asks the MLflow store."""
    storage, uri = Storage.open("memory://bucket/outputs"), f"sqlite:///{tmp_path}/mlflow.db"
    tracker = open_tracker(storage, tracking_uri=uri)
    gone = this_process().model_copy(update={"pid": 2**22 + 1})
    tags = {"killed": gone, "live": this_process()}
    runs = {
        name: tracker.client.create_run(
            tracker.experiment_id, tags={PROCESS: who.to_json().decode()}
        )
        for name, who in tags.items()
    }
    with working(storage, uri):
        now = {n: tracker.client.get_run(r.info.run_id).info.status for n, r in runs.items()}
    assert now == {"killed": "KILLED", "live": "RUNNING"}
