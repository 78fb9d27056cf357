"""What is kept is read as it was written, or it is `Damaged`: each form, each kind of damage."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config import UserError
from pipelines.data import kept
from pipelines.data.kept import Damaged, Entry, FileSeal
from pipelines.data.storage import Storage
from pipelines.records import StoredRecord


class Note(StoredRecord):
    text: str
    numbers: tuple[float, ...] = ()


class Letter(StoredRecord):
    text: str


TABLES = {
    "features": pa.table(
        {
            "key": ["a", "b", "c"],
            "feature": pa.FixedSizeListArray.from_arrays(pa.array([0.5, 1, 2, 3, 4, 5]), 2),
            "image_hash": pa.array([b"1", None, b"3"], pa.binary(1)),
        }
    ),
    "nulls": pa.table({"tau": pa.array([0.1, None, 0.3]), "number": [1, 2, 3]}),
    "none": pa.table({"key": pa.array([], pa.string())}),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def record(storage: Storage, name: str) -> Callable[[], object]:
    note = Note(text=f"of {name}", numbers=(0.1, 1e300, 3.0))
    kept.write_record(storage, note, "kind", f"{name}.json")
    return lambda: kept.read_record(storage, Note, "kind", f"{name}.json")


def table(storage: Storage, name: str) -> Callable[[], object]:
    content = TABLES["features"].append_column("of", pa.array([name] * 3))
    kept.write_table(storage, content, "kind", f"{name}.parquet")
    return lambda: kept.read_table(storage, "kind", f"{name}.parquet")


def file(storage: Storage, name: str) -> Callable[[], object]:
    kept.write_file(storage, f"of {name}\n".encode() * 9, "kind", f"{name}.pt")
    return lambda: kept.read_file(storage, "kind", f"{name}.pt")


def entry(storage: Storage, name: str) -> Callable[[], object]:
    folder = Entry(storage, ("kind", name), Note)
    folder.write(Note(text=name), {"best/head": f"of {name}".encode()})
    return lambda: folder.read_all(["best/head"])


FORMS = {"record": record, "table": table, "file": file, "entry": entry}
FILES = {
    "record": ["kind/{}.json"],
    "table": ["kind/{}.parquet"],
    "file": ["kind/{}.pt"],
    "entry": ["kind/{}/manifest.json", "kind/{}/best/head"],
}
CASES = [(form, path) for form, paths in FILES.items() for path in paths]


@pytest.mark.parametrize(("form", "path"), CASES)
def test_any_flipped_byte_is_seen_or_changes_nothing(
    storage: Storage, form: str, path: str
) -> None:
    read = FORMS[form](storage, "one")
    expected, file = read(), storage.local(path.format("one"))
    content = file.read_bytes()
    seen = 0
    for place in range(len(content)):
        for bit in (0x01, 0x80) if form == "table" else (0x01, 0x20, 0x80):
            file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            try:
                assert read() == expected
            except Damaged:
                seen += 1
    assert seen > len(content)


@pytest.mark.parametrize(("form", "path"), CASES)
def test_a_file_that_was_cut_is_damaged_wherever_it_was_cut(
    storage: Storage, form: str, path: str
) -> None:
    read = FORMS[form](storage, "one")
    expected, file = read(), storage.local(path.format("one"))
    content = file.read_bytes()
    for length in range(len(content.rstrip(b"\n")) if form != "file" else len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(Damaged):
            read()
    file.write_bytes(content)
    assert read() == expected


@pytest.mark.parametrize(("form", "path"), CASES)
def test_another_of_its_kind_in_its_place_is_damaged(
    storage: Storage, form: str, path: str
) -> None:
    read, _ = FORMS[form](storage, "one"), FORMS[form](storage, "two")
    other = storage.local(path.format("two")).read_bytes()
    storage.local(path.format("one")).write_bytes(other)
    with pytest.raises(Damaged, match="not the bytes that were written here"):
        read()


@pytest.mark.parametrize(("form", "path"), CASES)
def test_what_is_missing_is_said(storage: Storage, form: str, path: str) -> None:
    read = FORMS[form](storage, "one")
    storage.local(path.format("one")).unlink()
    with pytest.raises(Damaged, match=f"{path.format('one').split('/')[-1]}: missing; run"):
        read()


def test_a_record_of_another_kind_is_damaged(storage: Storage) -> None:
    kept.write_record(storage, Letter(text="a"), "one.json")
    assert kept.read_record(storage, Letter, "one.json") == Letter(text="a")
    kept.write_record(storage, Note(text="a", numbers=(1.0,)), "one.json")
    with pytest.raises(Damaged, match="not a Letter of this version"):
        kept.read_record(storage, Letter, "one.json")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b"[" * 100_000, b'{"sealed": 3}'])
def test_any_other_json_is_no_record(storage: Storage, content: bytes) -> None:
    storage.write_bytes(content, "one.json")
    with pytest.raises(Damaged, match="not a sealed record"):
        kept.read_record(storage, Note, "one.json")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_comes_back_with_its_metadata(storage: Storage, name: str) -> None:
    content = TABLES[name].replace_schema_metadata({"rejected": "[]"})
    kept.write_table(storage, content, "t.parquet")
    found = kept.read_table(storage, "t.parquet")
    assert found.equals(content)
    assert found.schema.metadata[b"rejected"] == b"[]"


def test_an_unsealed_table_is_damaged(storage: Storage) -> None:
    storage.write_table(TABLES["nulls"], "t.parquet")
    with pytest.raises(Damaged, match="not the bytes"):
        kept.read_table(storage, "t.parquet")


def test_a_storage_may_move_as_a_whole(storage: Storage, tmp_path: Path) -> None:
    for form in FORMS.values():
        form(storage, "one")
    (tmp_path / "kind").rename(tmp_path / "moved")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "moved").rename(moved / "kind")
    elsewhere = Storage(str(moved))
    assert kept.read_file(elsewhere, "kind", "one.pt").startswith(b"of one")
    assert Entry(elsewhere, ("kind", "one"), Note).check() == Note(text="one")


def test_what_can_be_made_again_is_removed_and_told_of_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    for form, path in CASES:
        FORMS[form](storage, "one")
        storage.local(path.format("one")).write_bytes(b"?")
    assert kept.find_record(storage, Note, "kind", "one.json") is None
    assert kept.find_table(storage, "kind", "one.parquet") is None
    assert kept.find_file(storage, "kind", "one.pt") is None
    folder = Entry(storage, ("kind", "one"), Note)
    assert folder.find() is None
    assert [line.getMessage().rpartition(";")[2] for line in caplog.records] == [
        " it is removed and made again"
    ] * 4
    caplog.clear()
    assert kept.find_record(storage, Note, "kind", "one.json") is None
    assert folder.find() is None
    assert not caplog.records
    folder.write(Note(text="again"), {"best/head": b"again"})
    assert folder.find() == Note(text="again")


def test_a_damaged_file_of_an_entry_takes_its_record_along(storage: Storage) -> None:
    folder = Entry(storage, ("kind", "one"), Note)
    folder.write(Note(text="one"), {"a": b"a", "b": b"b"})
    storage.local("kind", "one", "a").write_bytes(b"A")
    assert folder.find() is None
    assert storage.names("kind", "one") == ["b"]


def test_an_entry_says_what_of_it_is_gone(storage: Storage) -> None:
    folder = Entry(storage, ("kind", "one"), Note)
    assert folder.lost() == [storage.path("kind", "one", "manifest.json")]
    storage.write_bytes(b"large", "kind", "one", "there")
    folder.write(Note(text="one"), {"best/a": b"a"}, there={"there": FileSeal.of(b"large")})
    assert folder.lost() == []
    storage.local("kind", "one", "best", "a").unlink()
    assert folder.lost() == [storage.path("kind", "one", "best/a")]


def test_damage_passes_between_processes_as_what_it_is() -> None:
    damaged = Damaged("/a/b", "missing", [("b",)])
    again = pickle.loads(pickle.dumps(damaged))
    assert isinstance(again, UserError)
    assert (str(again), again.bad) == (str(damaged), (("b",),))


def test_a_stream_is_hashed_like_a_file(storage: Storage, tmp_path: Path) -> None:
    content = b"x" * (3 << 20)
    storage.write_bytes(content, "large")
    seal = FileSeal.of(content)
    assert storage.size_and_sha256("large") == (seal.size, seal.sha256)
    assert FileSeal.of_file(tmp_path / "large") == seal
