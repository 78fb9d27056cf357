"""A finished run, copied for each test that damages or moves it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.store.move import MoveConfig
from pipelines.store.move import run as move
from tests.conftest import SmokeRun
from tests.ray.commands import job_here

WORDS = (
    "preset=test", "methods=[coop]", "scores=[mcm]", "sweep=none", "training=in_process",
    "methods.coop.training.epochs=1", "compare_defaults=false",
)  # fmt: skip


def pipeline(storage: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return job_here("pipeline", *WORDS, f"storage={storage}", *words)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a refused command says: exit status 2, one line, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="session")
def finished(
    ray_cluster: None, smoke_run: SmokeRun, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The storage of a finished run; copy it, change nothing in it."""
    storage = tmp_path_factory.mktemp("finished") / "storage"
    smoke_run.copy_cache(storage, "backbones", "features")
    done = pipeline(storage)
    assert done.returncode == 0, done.stdout + done.stderr
    return storage


@pytest.fixture
def storage(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished storage, mended."""
    copy = Path(shutil.copytree(finished, tmp_path / "storage"))
    move(MoveConfig(storage=str(copy)))
    return copy


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
