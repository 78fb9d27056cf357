"""A key names one image: sources where it does not are refused, and so are keys that are none."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import UserError
from pipelines.data.index_table import as_index
from pipelines.data.schema import INDEX
from pipelines.data.sources import FolderSource, ParquetSource, Source, TarSource
from pipelines.embed.plan import FeatureIdentity, make_plan

IDENTITY = FeatureIdentity(backbone={}, device="cpu", settings={}, source="", keys="all", code="")


def refused(source: Source) -> str:
    with pytest.raises(UserError) as caught:
        source.index()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def parquet(path: Path, keys: list[str | None], **columns: list[object]) -> ParquetSource:
    pq.write_table(pa.table({"key": keys, "image": [b"x"] * len(keys), **columns}), path)
    return ParquetSource(root=str(path))


def tar(path: Path, names: list[str]) -> TarSource:
    with tarfile.open(path, "w", errors="surrogateescape") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    return TarSource(root=str(path))


def test_a_parquet_key_that_two_classes_share(tmp_path: Path) -> None:
    source = parquet(
        tmp_path / "x.parquet", ["b", "a", "c", "a", "b"], class_name=["0", "0", "0", "1", "1"]
    )
    said = refused(source)
    assert said.startswith(f"{source.root}: 2 keys stand there more than once (first: a, b);")


def test_a_key_in_two_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        parquet(tmp_path / f"{name}.parquet", ["same"])
    assert "1 keys stand there more than once (first: same)" in refused(
        ParquetSource(root=str(tmp_path))
    )


@pytest.mark.parametrize("bad", [None, ""])
def test_a_parquet_row_without_a_key(tmp_path: Path, bad: str | None) -> None:
    said = refused(parquet(tmp_path / "x.parquet", ["a", bad, "b"]))
    assert "1 of 3 rows have no key (first: row 1)" in said


def test_a_parquet_key_that_is_no_text(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0")
    keys = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    pq.write_table(pa.table({"key": keys, "image": [b"x", b"y"]}), tmp_path / "x.parquet")
    assert "x.parquet" in refused(ParquetSource(root=str(tmp_path / "x.parquet")))


def test_a_nul_in_a_csv_key(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "index.csv").write_bytes(b"key,class_name\na.jpg,one\nb\0.jpg,two\n")
    said = refused(FolderSource(root=str(tmp_path), table=str(tmp_path / "index.csv")))
    assert "1 keys hold a NUL byte (first: 'b\\x00.jpg')" in said


@pytest.mark.parametrize("again", ["a.jpg", "./a.jpg", "x/../a.jpg"])
def test_a_csv_that_names_a_file_twice(tmp_path: Path, again: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "index.csv").write_text(f"key,class_name\na.jpg,one\n{again},two\n")
    said = refused(FolderSource(root=str(tmp_path), table=str(tmp_path / "index.csv")))
    assert "more than once (first: a.jpg)" in said or "not a path below the source" in said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jpg", "b.jpg", "a.jpg"], "1 keys stand there more than once (first: x.tar/a.jpg)"),
        (["a.jpg", "a.cls", "a.cls"], "the member a.cls stands there twice"),
    ],
)
def test_a_doubled_member_of_a_tar(tmp_path: Path, names: list[str], said: str) -> None:
    assert said in refused(tar(tmp_path / "x.tar", names))


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(folder) + b"/b\xff.jpg")).write_bytes(b"x")
    assert "1 names are no UTF-8" in refused(FolderSource(root=str(folder)))
    assert "named in no UTF-8" in refused(tar(tmp_path / "x.tar", ["good.jpg", "b\udcff.jpg"]))


def test_a_source_of_another_package_is_checked_before_any_work(tmp_path: Path) -> None:
    class Doubled:
        def index(self) -> pa.Table:
            rows = [{"key": key} for key in ("a", "b", "b")]
            return pa.Table.from_pylist(rows, schema=INDEX)

    with pytest.raises(UserError, match=r"source mine: 1 keys stand there more than once.*: b\)"):
        make_plan("mine", Doubled(), IDENTITY, keys=["a"], shard_rows=4)  # type: ignore[arg-type]


def test_no_row_at_all_is_said_too(tmp_path: Path) -> None:
    """Arrow's `indices_nonzero` ends the process on a column without chunks."""
    assert as_index(pa.table({"key": pa.chunked_array([], pa.string())})).num_rows == 0
    source = parquet(tmp_path / "x.parquet", [])
    assert source.index().num_rows == 0
    with pytest.raises(UserError, match="source mine: no image"):
        make_plan("mine", source, IDENTITY, keys=None, shard_rows=4)
