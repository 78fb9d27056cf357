"""A disk that is full, a storage that cannot be written: one line, and then the command goes on."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.store.errors import explain, said_clearly
from pipelines.store.move import MoveConfig
from pipelines.store.move import run as move
from tests.store.conftest import one_line, pipeline

# What is taken from a finished storage, so that the stage is the first that has work to do.
UNDONE = {
    "embed": ("cache/features", "cache/heads", "cache/scores", "runs", "mlflow.db", "artifacts"),
    "finetune": (
        "cache/heads",
        "cache/scores",
        "runs/*/finetune.json",
        "runs/*/stamps/finetune.json",
    ),
    "score": ("cache/scores", "runs/*/score.json", "runs/*/stamps/score.json"),
    "register": ("runs/*/stamps/register.json", "mlflow.db", "artifacts"),
}
LEFT = 40 * 1024


def undone(storage: Path, stage: str) -> None:
    for pattern in UNDONE[stage]:
        for path in storage.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill(folder: Path) -> Path:
    """Fill the disk but for a little."""
    filler = folder / "filler"
    free = shutil.disk_usage(folder).free - LEFT
    with filler.open("wb") as file:
        file.write(b"\0" * free)
    return filler


@pytest.mark.parametrize("stage", UNDONE)
def test_a_full_disk_is_one_line_in_every_stage(
    finished: Path, small_disk: Path, stage: str
) -> None:
    storage = Path(shutil.copytree(finished, small_disk / "storage"))
    move(MoveConfig(storage=str(storage)))
    table = next(storage.glob("runs/*/metrics.json")).read_bytes()
    undone(storage, stage)
    filler = fill(small_disk)
    done = pipeline(storage)
    line = one_line(done)
    assert "o space left on device" in line or "disk is full" in line
    assert line.endswith("make room there; the same command goes on from here")
    assert f"{stage:<9} done" not in done.stdout
    filler.unlink()
    again = pipeline(storage)
    assert again.returncode == 0, again.stderr
    assert next(storage.glob("runs/*/metrics.json")).read_bytes() == table
    assert not list(storage.rglob(".*.tmp"))
    assert not list((storage / "leases").iterdir())


def test_a_disk_that_fills_up_while_ray_trains(finished: Path, small_disk: Path) -> None:
    storage = Path(shutil.copytree(finished, small_disk / "storage"))
    move(MoveConfig(storage=str(storage)))
    undone(storage, "finetune")
    words = ("training=ray", "compute.max_failures=0")
    filler = fill(small_disk)
    line = one_line(pipeline(storage, *words))
    assert "o space left on device" in line or "disk is full" in line
    filler.unlink()
    again = pipeline(storage, *words)
    assert again.returncode == 0, again.stderr
    assert not list((storage / "cache" / "ray_train").iterdir())


def test_a_storage_that_is_read_only(finished: Path, small_disk: Path) -> None:
    storage = Path(shutil.copytree(finished, small_disk / "storage"))
    move(MoveConfig(storage=str(storage)))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = one_line(pipeline(storage))
    assert "Read-only file system" in line
    assert line.endswith("make it readable and writable; the same command goes on from here")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert pipeline(storage).stdout.count("found, nothing to do") == 6


def test_a_storage_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for storage, why in ((file, "a file; give a folder"), (file / "below", "Not a directory")):
        assert why in one_line(pipeline(storage))
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Wrapped(Exception):
    """As Ray wraps what its processes raise."""

    __module__ = "ray.exceptions"

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        super().__init__(text)
        self.cause = cause


def test_the_error_of_another_process_is_found_in_rays() -> None:
    storage = Storage("/data")
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    wanted = "storage=/data: No space left on device: '/data/x'; make room there; "
    for error in (
        full,
        Wrapped("task failed", full),
        Wrapped("task failed", Wrapped("actor failed", full)),
        Wrapped("Traceback...\nOSError: [Errno 28] No space left on device: '/data/x'\n"),
    ):
        assert (explain(error, storage) or "").startswith(wanted)
    assert explain(Wrapped("task failed", UserError("shard 3 is damaged")), storage) == (
        "shard 3 is damaged"
    )


def test_a_defect_is_not_hidden() -> None:
    for defect in (KeyError("name"), Wrapped("task failed", ValueError("no")), AssertionError()):
        assert explain(defect, Storage("/data")) is None
        with pytest.raises(type(defect)), said_clearly(Storage("/data")):
            raise defect
