"""A storage that was copied or moved: refused with the way out; the original is never touched."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.data.digits import DigitsSource
from pipelines.data.storage import Storage
from pipelines.store.tracker import open_tracker
from tests.ray.commands import job_here
from tests.store.conftest import one_line, pipeline


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def predict(storage: Path, folder: Path) -> str:
    (image,) = DigitsSource().read(["digits/0003/plain"])
    assert isinstance(image, bytes)
    (folder / "digit.png").write_bytes(image)
    done = job_here("predict", f"source={folder}/digit.png", f"storage={storage}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_copy_is_refused_mended_and_then_leaves_the_original_alone(
    finished: Path, tmp_path: Path
) -> None:
    before = state(finished)
    (tmp_path / "x.png").write_bytes(b"x")
    copy = Path(shutil.copytree(finished, tmp_path / "a copy"))
    for refused in (
        pipeline(copy),
        job_here("predict", f"source={tmp_path}/x.png", f"storage={copy}"),
    ):
        line = one_line(refused)
        assert f"storage={copy}: made at {finished} and moved or copied" in line
        assert line.endswith(f"python -m jobs.move 'storage={copy}'")
    mended = job_here("move", f"storage={copy}")
    assert mended.returncode == 0
    assert f"paths rewritten from {finished}" in mended.stdout
    assert job_here("move", f"storage={copy}").stdout == "move: nothing to mend\n"
    done = pipeline(copy)
    assert done.stdout.count("found, nothing to do") == 6
    done = pipeline(copy, "target_tpr=0.9")  # another run: it writes all that a run writes
    assert done.returncode == 0, done.stderr
    assert "version 2" in done.stdout
    assert state(finished) == before
    assert str(finished).encode() not in b"".join(
        line
        for line in (copy / "mlflow.db").read_bytes().split(b"\0")
        if b"artifacts" in line and b"file://" in line
    )


def test_a_moved_storage_judges_once_it_is_mended(finished: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(finished, tmp_path / "first"))
    job_here("move", f"storage={first}")
    said = predict(first, tmp_path)
    moved = first.rename(tmp_path / "moved")
    assert "moved or copied" in one_line(pipeline(moved))
    assert job_here("move", f"storage={moved}").returncode == 0
    assert predict(moved, tmp_path) == said
    assert not first.exists()


def test_the_same_folder_by_another_name_is_not_moved(mlflow_store, tmp_path: Path) -> None:
    other = tmp_path / "link"
    other.symlink_to(mlflow_store.storage.root)
    assert open_tracker(Storage(str(other))).experiment_id == mlflow_store.tracker.experiment_id


def test_there_is_nothing_to_move_where_no_store_is(tmp_path: Path) -> None:
    from pipelines.store.move import MoveConfig, run

    with pytest.raises(UserError, match=r"no mlflow\.db there, nothing to mend"):
        run(MoveConfig(storage=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
