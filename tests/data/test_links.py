"""Folders with links and without permission: each real file once, nothing outside, no silence."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.data.images import Rejected
from pipelines.data.sources import FolderSource, ParquetSource, open_source

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files in three folders."""
    for number in range(7):
        path = tmp_path / "set" / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(number).encode())
    return tmp_path / "set"


def keys(root: Path) -> list[str]:
    return FolderSource(root=str(root)).index()["key"].to_pylist()


def test_folders_linked_crosswise_count_once(folder: Path) -> None:
    before = keys(folder)
    for one in "abc":
        for other in "abc":
            (folder / one / f"to_{other}").symlink_to(folder / other)
    (folder / "all").symlink_to(folder)
    assert keys(folder) == before
    assert len(before) == 7


def test_a_link_to_a_file_counts_where_the_file_does_not(folder: Path) -> None:
    before = keys(folder)
    (folder / "again.jpg").symlink_to(folder / "a" / "0.jpg")
    store = folder / ".store"  # as git-annex keeps its files
    store.mkdir()
    (store / "content").write_bytes(b"annexed")
    for name in ("kept.jpg", "kept too.jpg"):
        (folder / "b" / name).symlink_to(store / "content")
    assert keys(folder) == sorted([*before, "b/kept too.jpg"])
    assert FolderSource(root=str(folder)).read(["b/kept too.jpg"]) == [b"annexed"]


def test_nothing_outside_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "a" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (bad,) = FolderSource(root=str(folder)).read(["a/link.jpg"])
    assert isinstance(bad, Rejected)
    assert bad.reason == "unsafe_path"
    (folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"the link elsewhere leads out of it, to .*; nothing"):
        keys(folder)
    table = tmp_path / "index.csv"
    table.write_text("key\nelsewhere/secret.jpg\n")
    (bad,) = FolderSource(root=str(folder), table=str(table)).read(["elsewhere/secret.jpg"])
    assert isinstance(bad, Rejected)


def test_a_parquet_file_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"key": ["a"], "image": [b"x"]}), tmp_path / "real")
    (folder / "x.parquet").symlink_to(tmp_path / "real")
    assert ParquetSource(root=str(folder / "x.parquet")).read(["a"]) == [b"x"]  # named, so wanted
    with pytest.raises(UserError, match=r"x\.parquet: a link that leads out.*a folder above both"):
        open_source(str(folder)).index()
    (folder / "x.parquet").unlink()
    (folder / "x.parquet").symlink_to(folder / "gone")
    with pytest.raises(UserError, match=r"x\.parquet: no such file, or a link to nothing"):
        open_source(str(folder)).index()


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom permissions bind; root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder for everyone, of which one class cannot be read."""
    root = Path(tempfile.mkdtemp())
    for name in ("open", "closed"):
        (root / name).mkdir()
        (root / name / "0.jpg").write_bytes(b"x")
    root.chmod(0o755)
    (root / "closed").chmod(0)
    yield root
    (root / "closed").chmod(0o755)
    shutil.rmtree(root)


def test_a_folder_that_cannot_be_read_is_named(closed: Path) -> None:
    with without_rights(), pytest.raises(UserError) as caught:
        keys(closed)
    assert str(caught.value).startswith(
        f"{closed}/closed: this folder cannot be read (Permission denied)"
    )


def test_a_root_below_one_that_cannot_be_read(closed: Path) -> None:
    for root in ("closed/below", "closed/x.parquet", "closed/x.tar"):
        with without_rights(), pytest.raises(UserError):
            open_source(str(closed / root)).index()
    with pytest.raises(UserError, match="no such folder"):
        open_source("~nobody-of-that-name/x").index()
