"""Files are seen whole or not at all, also after a writer is killed; URIs work the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from pipelines.config import UserError
from pipelines.data.storage import Storage

# Writes half of a file, says so, and waits to be killed.
STUCK = """
import sys, time
from pipelines.data.storage import Storage
with Storage(sys.argv[1]).writing("runs", "x", "data.bin") as path:
    with path.open("wb") as file:
        file.write(b"new" * 1000)
        file.flush()
        print("half", flush=True)
        time.sleep(120)
"""
# Replaces a file again and again by a block of one byte of a size that this byte decides.
BUSY = """
import sys
from pipelines.data.storage import Storage
storage, number = Storage(sys.argv[1]), 0
print("writing", flush=True)
while True:
    number = (number + 1) % 256
    storage.write_bytes(bytes([number]) * (20_000 + 1000 * number), "runs", "x", "data.bin")
"""


def start(code: str, root: Path) -> subprocess.Popen[str]:
    """A Python process that has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def memory() -> Iterator[Storage]:
    root = f"memory://energy-ood-{uuid.uuid4().hex}"
    storage = Storage.open(root)
    storage.write_bytes(b"", "mark")
    yield storage
    fsspec.filesystem("memory").rm(root, recursive=True)


class TestWholeOrNotAtAll:
    def test_a_writer_killed_half_way_leaves_nothing_to_see(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        kill(start(STUCK, tmp_path))
        assert not storage.exists("runs", "x", "data.bin")
        assert "data.bin" not in storage.names("runs", "x")
        storage.write_bytes(b"whole", "runs", "x", "data.bin")
        assert storage.read_bytes("runs", "x", "data.bin") == b"whole"

    def test_a_writer_killed_half_way_leaves_the_old_file(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        storage.write_bytes(b"old", "runs", "x", "data.bin")
        kill(start(STUCK, tmp_path))
        assert storage.read_bytes("runs", "x", "data.bin") == b"old"

    def test_a_reader_beside_a_writer_sees_whole_files_only(self, tmp_path: Path) -> None:
        storage, seen = Storage(str(tmp_path)), set()
        for _ in range(2):
            process = start(BUSY, tmp_path)
            end = time.monotonic() + 0.7
            while time.monotonic() < end or (len(seen) <= 2 and time.monotonic() < end + 60):
                if storage.exists("runs", "x", "data.bin"):
                    content = storage.read_bytes("runs", "x", "data.bin")
                    assert content == content[:1] * (20_000 + 1000 * content[0])
                    seen.add(content[0])
            kill(process)
            content = storage.read_bytes("runs", "x", "data.bin")
            assert content == content[:1] * (20_000 + 1000 * content[0])
        assert len(seen) > 2

    def test_an_error_while_writing_leaves_no_file_and_no_litter(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))

        def fail() -> None:
            with storage.writing("a", "b.txt") as path:
                path.write_text("half")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert list((tmp_path / "a").iterdir()) == []

    def test_the_first_of_two_writers_wins_where_nothing_is_replaced(self, tmp_path: Path) -> None:
        storage, barrier = Storage(str(tmp_path)), threading.Barrier(8)
        written = []

        def write(number: int) -> None:
            with storage.writing("a", "b.txt", replace=False) as path:
                path.write_text(str(number))
                barrier.wait()
            written.append(storage.read_bytes("a", "b.txt"))

        threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(written) == 8
        assert set(written) == {storage.read_bytes("a", "b.txt")}
        assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b.txt"]


class TestUris:
    def test_all_kinds_of_files(self, memory: Storage) -> None:
        assert not memory.is_local
        assert memory.names("runs") == []
        memory.write_bytes(b"abc", "runs", "x", "a.bin")
        memory.write_json({"b": [1.5], "a": None}, "runs", "x", "b.json")
        memory.write_table(pa.table({"n": [1, 2], "m": ["x", "y"]}), "runs", "y", "c.parquet")
        assert memory.exists("runs", "x", "a.bin")
        assert not memory.exists("runs", "x", "c.parquet")
        assert memory.names("runs") == ["x", "y"]
        assert memory.names("runs", "x") == ["a.bin", "b.json"]
        assert memory.read_bytes("runs", "x", "a.bin") == b"abc"
        assert memory.read_json("runs", "x", "b.json") == {"a": None, "b": [1.5]}
        assert memory.read_table("runs", "y", "c.parquet", columns=["m"]).to_pydict() == {
            "m": ["x", "y"]
        }
        assert memory.path("runs", "x") == f"{memory.root}/runs/x"

    def test_the_first_file_stays_where_nothing_is_replaced(self, memory: Storage) -> None:
        for content in ("first", "second"):
            with memory.writing("a", "b.txt", replace=False) as path:
                path.write_text(content)
        assert memory.read_bytes("a", "b.txt") == b"first"
        memory.write_bytes(b"third", "a", "b.txt")
        assert memory.read_bytes("a", "b.txt") == b"third"

    def test_an_upload_that_fails_half_way_shows_nothing(self, memory: Storage) -> None:
        def fail() -> None:
            with memory.writing("a", "b.txt") as path:
                path.write_text("half")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert not memory.exists("a", "b.txt")

    def test_what_needs_a_folder_says_so(self, memory: Storage) -> None:
        with pytest.raises(UserError, match=r"storage=memory://.*folder of this machine"):
            memory.local("mlflow.db")

    def test_a_local_folder_written_as_a_uri_is_a_folder(self, tmp_path: Path) -> None:
        storage = Storage.open(f"file://{tmp_path}")
        assert storage == Storage.open(str(tmp_path))
        assert storage.is_local


class TestOpen:
    def test_a_relative_path_is_below_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert Storage.open("./outputs").root == str(tmp_path.resolve() / "outputs")
        assert Storage.open("outputs/").root == str(tmp_path.resolve() / "outputs")

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Storage.open("~/outputs").root == str(tmp_path.resolve() / "outputs")

    def test_a_relative_path_inside_a_ray_job_is_refused_with_the_fix(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Ray sets this variable for the entry point of a submitted job.
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with pytest.raises(UserError, match=r"storage='outputs'.*absolute path or a URI"):
            Storage.open("outputs")
        assert Storage.open(str(tmp_path)).root == str(tmp_path.resolve())
        assert Storage.open("memory://bucket/folder/").root == "memory://bucket/folder"

    def test_json_holds_no_number_that_json_has_not(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON"):
            Storage(str(tmp_path)).write_json({"a": float("nan")}, "a.json")
        assert not (tmp_path / "a.json").exists()
