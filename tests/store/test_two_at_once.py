"""Two processes at once on one storage, let go together at a barrier."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from pipelines.data.storage import Storage
from pipelines.store.tracker import open_tracker
from tests.barrier import wait_until
from tests.patience import PATIENCE
from tests.ray.commands import ROOT, end, ray_folder, start

Popen = subprocess.Popen[str]


def held(what: str, storage: Path, folder: Path, name: str, *more: str) -> Popen:
    """A process of `tests.store.held`, once it is ready."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.store.held", what, str(storage),
         str(folder), name, *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def is_ready(process: Popen, folder: Path, name: str) -> bool:
    assert process.poll() is None, process.communicate()[1]
    return (folder / name).exists()


def together(what: str, storage: Path, folder: Path, *more: str) -> list[str]:
    """Run two of them at once; what each printed."""
    both = {name: held(what, storage, folder, name, *more) for name in ("one", "two")}
    for name, process in both.items():
        wait_until(lambda p=process, n=name: is_ready(p, folder, n))  # type: ignore[misc]
    (folder / "go").touch()
    said = [process.communicate(timeout=PATIENCE) for process in both.values()]
    for process, (_, error) in zip(both.values(), said, strict=True):
        assert process.returncode == 0, error
    return [out.strip() for out, _ in said]


@pytest.mark.slow
def test_a_new_store_is_created_once(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    runs = together("opens", storage, tmp_path / "barrier")
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    for run in runs:
        assert client.get_run(run).info.status == "FINISHED"
    assert len(client.search_experiments(filter_string="name = 'energy-ood'")) == 1
    assert not list(storage.glob(".*.tmp"))


@pytest.mark.slow
def test_the_same_model_twice_at_once_is_one_version(
    tmp_path: Path, backbone_files: dict[str, tuple[Path, Path]]
) -> None:
    storage = tmp_path / "storage"
    tracker = open_tracker(Storage.open(str(storage)))
    files = map(str, backbone_files["resnet"])
    assert together("registers", storage, tmp_path / "barrier", *files) == ["1", "1"]
    assert len(tracker.client.search_model_versions("name = 'energy-ood'")) == 1
    assert len(list((storage / "artifacts" / "models").iterdir())) == 1


@pytest.mark.slow
def test_two_first_runs_at_once_do_the_work_once(tmp_path: Path, mini_storage: Storage) -> None:
    storage = tmp_path / "storage"
    words = ("preset=test", "methods=[coop]", "scores=[mcm]", "sweep=none", f"storage={storage}")
    with ray_folder() as one, ray_folder() as two:
        both = [start("jobs.pipeline", *words, folder=folder) for folder in (one, two)]
        try:
            said = [process.communicate(timeout=PATIENCE) for process in both]
        finally:
            for process in both:
                end(process)
    assert [process.returncode for process in both] == [0, 0], said
    found = sorted(out.count("found, nothing to do") for out, _ in said)
    assert found == [0, 6]
    assert "waiting" in "".join(err for _, err in said)
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert len(client.search_model_versions("name = 'energy-ood'")) == 1
