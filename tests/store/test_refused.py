"""A disk that is full, a storage that cannot be written: one line, and then the command goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.data.digits import DigitsSource
from pipelines.data.kept import Damaged
from pipelines.data.storage import Storage
from pipelines.store.errors import damaged_in, explain, said_clearly
from pipelines.store.move import MoveConfig
from pipelines.store.move import run as move
from tests.ray.commands import ROOT, job_here
from tests.store.conftest import WORDS, one_line, pipeline

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


@pytest.mark.parametrize(
    "stage",
    [pytest.param(s, marks=[pytest.mark.slow] if s == "embed" else []) for s in UNDONE],
)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_other_commands_on_a_storage_that_is_read_only(finished: Path, small_disk: Path) -> None:
    """A model judges as ever; features cannot be kept."""
    storage = Path(shutil.copytree(finished, small_disk / "storage"))
    move(MoveConfig(storage=str(storage)))
    image = small_disk / "images" / "digit.png"
    image.parent.mkdir()
    (content,) = DigitsSource().read(["digits/0000/plain"])
    assert isinstance(content, bytes)
    image.write_bytes(content)
    words = (f"source={image.parent}", f"storage={storage}")
    expected = job_here("predict", *words)
    assert expected.returncode == 0, expected.stderr
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        assert job_here("predict", *words).stdout == expected.stdout
        line = one_line(job_here("embed", *words, "backbone=mini"))
        assert "Read-only file system" in line
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


# Root reads everything; without these two rights it is a user like any other.
AS_A_USER = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


@pytest.mark.slow
@pytest.mark.parametrize(
    "unreadable",
    [
        "",
        "mlflow.db",
        pytest.param("cache/features", marks=pytest.mark.slow),
        pytest.param("runs", marks=pytest.mark.slow),
    ],
)
def test_a_storage_that_is_not_readable(storage: Path, unreadable: str) -> None:
    path = storage / unreadable
    mode = path.stat().st_mode
    path.chmod(0)
    command = [sys.executable, "-m", "jobs.pipeline", *WORDS, f"storage={storage}"]
    if os.geteuid() == 0:
        if shutil.which(AS_A_USER[0]) is None:
            pytest.skip("run as root, and no setpriv here to give its rights away")
        command = [*AS_A_USER, *command]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        path.chmod(mode)
    line = one_line(done)
    assert line.endswith("make it readable and writable; the same command goes on from here")
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


def test_what_a_process_of_ray_finds_damaged_is_known_here(ray_cluster: None) -> None:
    import ray

    @ray.remote
    def reads() -> None:
        raise Damaged("/data/x", "cut", [("cache", "x")])

    with pytest.raises(ray.exceptions.RayError) as error:
        ray.get(reads.remote())
    for raised in (error.value, Wrapped("training failed", error.value)):
        damaged = damaged_in(raised)
        assert damaged is not None
        assert (damaged.place, damaged.why, damaged.bad) == ("/data/x", "cut", (("cache", "x"),))
    assert damaged_in(Wrapped("task failed", UserError("no"))) is None


def test_a_defect_is_not_hidden() -> None:
    for defect in (KeyError("name"), Wrapped("task failed", ValueError("no")), AssertionError()):
        assert explain(defect, Storage("/data")) is None
        with pytest.raises(type(defect)), said_clearly(Storage("/data")):
            raise defect
