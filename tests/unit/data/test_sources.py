import os
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import UserError
from pipelines.data.schema import INDEX
from pipelines.data.sources import FolderSource, ParquetSource, Source, open_source


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "images"
    shutil.copytree(pictures, copy)
    (copy / "notes.txt").write_text("not an image")
    return copy


@pytest.fixture
def parquet(pictures: Path, tmp_path: Path) -> Path:
    files = sorted(pictures.rglob("*.jpg"))[::-1]  # not in key order
    table = pa.table(
        {
            "key": [f"k/{path.stem}" for path in files],
            "image": [path.read_bytes() for path in files],
            "class_name": [path.parent.name for path in files],
            "split": ["test"] * len(files),
        }
    )
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=7)
    return tmp_path / "images.parquet"


def test_folder_names_classes_and_reads_bytes(folder: Path) -> None:
    source = FolderSource(root=str(folder), domain="photo")
    index = source.index()
    assert index.schema.equals(INDEX)
    keys = index["key"].to_pylist()
    assert keys == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jpg"))
    assert index["class_name"].to_pylist() == [key.split("/")[0] for key in keys]
    assert index["domain"].unique().to_pylist() == ["photo"]
    assert source.read(keys[3:5]) == [(folder / key).read_bytes() for key in keys[3:5]]
    assert isinstance(source.read(["class_0/none.jpg"])[0], FileNotFoundError)


def test_folder_with_a_table(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "index.csv"
    table.write_text("key,class_name\nclass_1/001.jpg,007\nclass_0/000.jpg,cat\n")
    index = FolderSource(root=str(folder), table=str(table)).index()
    assert index["key"].to_pylist() == ["class_0/000.jpg", "class_1/001.jpg"]
    assert index["class_name"].to_pylist() == ["cat", "007"]


@pytest.mark.parametrize("key", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "C:\\x.jpg", ""])
def test_a_table_cannot_name_files_outside(folder: Path, tmp_path: Path, key: str) -> None:
    table = tmp_path / "index.parquet"
    pq.write_table(pa.table({"key": [key]}), table)
    with pytest.raises(UserError, match="not a path below the source"):
        FolderSource(root=str(folder), table=str(table)).index()


def test_parquet_reads_rows_by_key_in_any_order(parquet: Path, pictures: Path) -> None:
    source = ParquetSource(root=str(parquet))
    index = source.index()
    assert index.schema.equals(INDEX)
    keys = index["key"].to_pylist()
    assert keys == [f"k/{number:03d}" for number in range(30)]
    assert index["class_name"].to_pylist() == [f"class_{n % 3}" for n in range(30)]
    chosen = [keys[i] for i in (29, 0, 13, 13, 7)]
    expected = [next(pictures.rglob(f"{key[2:]}.jpg")).read_bytes() for key in chosen]
    assert source.read(chosen) == expected
    assert isinstance(source.read(["nobody"])[0], KeyError)


def test_hugging_face_parquet_without_keys(pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.jpg"))
    for number, part in enumerate((files[:20], files[20:])):
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in part]
        pq.write_table(pa.table({"image": images}), tmp_path / f"train-{number}.parquet")
    source = ParquetSource(root=str(tmp_path))
    keys = source.index()["key"].to_pylist()
    assert keys[19:21] == ["train-0.parquet/000000019", "train-1.parquet/000000000"]
    assert source.read(keys[19:21]) == [path.read_bytes() for path in files[19:21]]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_fingerprint_follows_the_content(kind: str, folder: Path, parquet: Path) -> None:
    source: Source
    if kind == "folder":
        source, file = FolderSource(root=str(folder)), folder / "class_0" / "000.jpg"
    else:
        source, file = ParquetSource(root=str(parquet)), parquet
    before = source.fingerprint()
    assert source.fingerprint() == pickle.loads(pickle.dumps(source)).fingerprint() == before
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)  # same size ...
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # ... and same time of change
    changed = source.fingerprint()
    assert changed != before
    shutil.copy(file, file.with_name(f"copy{file.suffix}"))
    if kind == "folder":
        assert source.fingerprint() not in (before, changed)


def test_a_changed_file_is_read_anew(parquet: Path) -> None:
    source = ParquetSource(root=str(parquet))
    assert source.read(["k/000"])[0] != b"new"
    pq.write_table(pa.table({"key": ["k/000"], "image": [b"new"]}), parquet)
    assert source.read(["k/000"]) == [b"new"]


def test_mistakes_have_one_clear_message(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (FolderSource(root=str(tmp_path / "none")), "no such folder"),
        (FolderSource(root=str(tmp_path / "empty")), "no image here"),
        (ParquetSource(root=str(tmp_path / "none.parquet")), "no Parquet file"),
        (ParquetSource(root=str(tmp_path / "x.parquet")), "no column 'image'; it has key"),
        (ParquetSource(root=str(tmp_path / "y.parquet")), "not readable as Parquet"),
    ):
        with pytest.raises(UserError, match=message):
            source.index()
    with pytest.raises(UserError, match="no such folder or Parquet file"):
        open_source(str(tmp_path / "none"))


def test_open_source_tells_folders_from_parquet(folder: Path, parquet: Path) -> None:
    assert isinstance(open_source(str(folder)), FolderSource)
    assert isinstance(open_source(str(parquet)), ParquetSource)
    assert isinstance(open_source(str(parquet.parent)), ParquetSource)
