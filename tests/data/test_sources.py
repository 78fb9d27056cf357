import functools
import io
import os
import pickle
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.backbones.encoder import Preparer
from pipelines.config import UserError
from pipelines.data.images import Rejected
from pipelines.data.schema import INDEX
from pipelines.data.sources import FolderSource, ParquetSource, Source, TarSource, open_source


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


def test_classes_of_a_parquet_column_may_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text('{"names": {"moggy": "cat"}}')
    pq.write_table(
        pa.table({"image": [b"a", b"b"], "key": ["1", "2"], "class_name": ["moggy", "dog"]}),
        tmp_path / "images.parquet",
    )
    source = ParquetSource(
        root=str(tmp_path / "images.parquet"), class_map=f"{tmp_path}/lists.json#names"
    )
    assert source.index()["class_name"].to_pylist() == ["cat", "dog"]
    assert source.read(["2"]) == [b"b"]


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


def test_folders_that_mean_something_else(tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text('{"names": {"n1": "tench", "n2": "crane"}, "three": []}')
    keys = ["train/n1/a.jpg", "val/n2/deep/b.jpg", "val/n9/c.jpg", "d.jpg"]
    for key in keys:
        (tmp_path / "set" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / key).touch()

    def rows(**settings: object) -> dict[str, tuple[str | None, ...]]:
        found = FolderSource(root=str(tmp_path / "set"), **settings).index().to_pylist()
        return {r["key"]: (r["class_name"], r["domain"], r["split"]) for r in found}

    known = f"{tmp_path}/lists.json#names"
    assert rows(layout=["split", "class_name"], class_map=known) == {
        "train/n1/a.jpg": ("tench", None, "train"),
        "val/n2/deep/b.jpg": ("crane", None, "val"),
        "val/n9/c.jpg": ("n9", None, "val"),  # not in the map: its own name
        "d.jpg": (None, None, None),
    }
    assert set(rows(layout=[]).values()) == {(None, None, None)}
    assert rows(layout=["-", "domain"])["val/n2/deep/b.jpg"] == (None, "n2", None)
    plain = FolderSource(root=str(tmp_path / "set"))
    mapped = FolderSource(root=str(tmp_path / "set"), class_map=known)
    assert plain.fingerprint() == mapped.fingerprint()  # the same images, whatever they are called
    with pytest.raises(UserError, match="no mapping of folder names to class names 'none'"):
        rows(class_map=f"{tmp_path}/lists.json#none")


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


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tar(pictures: Path, tmp_path: Path) -> Path:
    members = {}
    for path in sorted(pictures.rglob("*.jpg")):
        members[f"{path.stem}.jpg"] = path.read_bytes()
        members[f"{path.stem}.cls"] = path.parent.name.encode()
        members[f"{path.stem}.json"] = b"{}"
    (tmp_path / "tars").mkdir()
    return tar_of(tmp_path / "tars" / "train-0.tar", members)


def test_webdataset_tars_are_read_in_place(tar: Path, pictures: Path) -> None:
    tar_of(tar.with_name("train-1.tar"), {"a/000.jpg": b"other"})
    source = TarSource(root=str(tar.parent), domain="web")
    index = source.index()
    assert index.schema.equals(INDEX)
    keys = [f"train-0.tar/{number:03d}.jpg" for number in range(30)] + ["train-1.tar/a/000.jpg"]
    assert index["key"].to_pylist() == keys
    assert index["class_name"].to_pylist() == [*(f"class_{n % 3}" for n in range(30)), None]
    chosen = [keys[i] for i in (12, 30, 3)]
    expected = [next(pictures.rglob(f"{n}.jpg")).read_bytes() for n in ("012", "003")]
    assert source.read(chosen) == [expected[0], b"other", expected[1]]
    assert isinstance(source.read(["train-0.tar/none.jpg"])[0], KeyError)
    before = source.fingerprint()
    tar_of(tar.with_name("train-1.tar"), {"a/000.jpg": b"OTHER"})
    assert source.fingerprint() != before
    assert source.read(keys[30:]) == [b"OTHER"]


def test_a_tar_cannot_lead_outside(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"../up.jpg": b"1", "/etc/root.jpg": b"2", "ok.jpg": b"3"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = TarSource(root=str(path))
    keys = source.index()["key"].to_pylist()
    found = dict(zip(keys, source.read(keys), strict=True))
    assert found.pop("x.tar/ok.jpg") == b"3"
    assert len(found) == 3
    assert all(isinstance(v, Rejected) and v.reason == "unsafe_path" for v in found.values())


def test_a_broken_tar_gives_what_it_has_and_says_so(tar: Path) -> None:
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    source = TarSource(root=str(tar))
    keys = source.index()["key"].to_pylist()
    assert 10 < len(keys) < 20
    rejected = [v for v in source.read(keys) if isinstance(v, Rejected)]
    assert [reason.reason for reason in rejected] == ["truncated"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The test's folder behind a local web server."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_sources_behind_a_web_address(
    address: str, folder: Path, parquet: Path, tar: Path, tmp_path: Path
) -> None:
    table = tmp_path / "index.csv"
    table.write_text("key,class_name\nclass_1/001.jpg,one\n")
    pairs: list[tuple[Source, Source]] = [
        (
            FolderSource(root=f"{address}/images", table=f"{address}/index.csv"),
            FolderSource(root=str(folder), table=str(table)),
        ),
        (open_source(f"{address}/images.parquet"), ParquetSource(root=str(parquet))),
        (open_source(f"{address}/tars/train-0.tar"), TarSource(root=str(tar))),
    ]
    for there, here in pairs:
        assert there.index().equals(here.index())
        keys = here.index()["key"].to_pylist()
        assert there.read(keys) == here.read(keys)
        assert there.fingerprint() == there.fingerprint() != here.fingerprint()


def test_a_slow_store_is_asked_for_several_files_at_once(
    folder: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(root=f"{address}/images")
    keys = source.index()["key"].to_pylist()[:20]
    asked = Quiet.do_GET

    def slow(self: Quiet) -> None:
        time.sleep(0.25)
        asked(self)

    monkeypatch.setattr(Quiet, "do_GET", slow)
    begin = time.monotonic()
    assert source.read(keys) == [(folder / key).read_bytes() for key in keys]
    assert time.monotonic() - begin < 20 * 0.25 / 2


def test_a_folder_in_an_object_store(pictures: Path) -> None:
    store = fsspec.filesystem("memory")
    files = sorted(pictures.rglob("*.jpg"))[:3]
    for path in files:
        store.pipe_file(f"/bucket/data/{path.parent.name}/{path.name}", path.read_bytes())
    store.pipe_file("/bucket/data/readme.txt", b"")
    source = FolderSource(root="memory://bucket/data")
    index = source.index()
    assert index["key"].to_pylist() == [f"{p.parent.name}/{p.name}" for p in files]
    assert source.read(index["key"].to_pylist()) == [path.read_bytes() for path in files]
    before = source.fingerprint()
    store.pipe_file(f"/bucket/data/{index['key'][0].as_py()}", b"other")
    assert source.fingerprint() != before
    assert isinstance(source.read(["none.jpg"])[0], FileNotFoundError)


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


def test_what_would_never_end_is_not_followed(folder: Path) -> None:
    before = FolderSource(root=str(folder)).index()["key"].to_pylist()
    (folder / "class_0" / "back").symlink_to(folder)
    (folder / "class_0" / "itself").symlink_to(folder / "class_0")
    (folder / "elsewhere").symlink_to(folder / "class_1")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zeros.jpg").symlink_to("/dev/zero")
    (folder / "memory.jpg").symlink_to("/proc/self/mem")  # opens, and cannot be read
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(2**30 + 1)
    source = FolderSource(root=str(folder))
    odd = ["pipe.jpg", "zeros.jpg", "memory.jpg", "huge.jpg"]
    assert source.index()["key"].to_pylist() == sorted([*before, *odd])
    pixels = Preparer(lambda image: image).batches(odd, source.read(odd), 8)
    (verdicts,) = [[(v.reason, v.message) for v in batch] for batch in pixels]
    reasons = ["unreadable", "unsafe_path", "unsafe_path", "too_large"]
    assert [reason for reason, _ in verdicts] == reasons
    assert "not a regular file" in verdicts[0][1]
    assert "1,073,741,825 bytes" in verdicts[3][1]


def test_mistakes_have_one_clear_message(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (FolderSource(root=str(tmp_path / "none")), "no such folder"),
        (FolderSource(root=str(tmp_path / "empty")), "no image here"),
        (ParquetSource(root=str(tmp_path / "none.parquet")), "no such file or folder"),
        (ParquetSource(root=str(tmp_path / "empty")), "no Parquet file"),
        (TarSource(root=str(tmp_path / "empty")), "no tar archive"),
        (FolderSource(root="nowhere://x"), "cannot be reached"),
        (ParquetSource(root=str(tmp_path / "x.parquet")), "no column 'image'; it has key"),
        (ParquetSource(root=str(tmp_path / "y.parquet")), "not readable as Parquet"),
    ):
        with pytest.raises(UserError, match=message):
            source.index()
    with pytest.raises(UserError, match="no such folder, Parquet file or tar"):
        open_source(str(tmp_path / "none"))


def test_open_source_tells_the_kinds_apart(folder: Path, parquet: Path, tar: Path) -> None:
    assert isinstance(open_source(str(folder)), FolderSource)
    assert isinstance(open_source(str(parquet)), ParquetSource)
    assert isinstance(open_source(str(parquet.parent)), ParquetSource)
    assert isinstance(open_source(str(tar.parent)), TarSource)
    assert isinstance(open_source(str(tar)), TarSource)
