"""Decoded images on disk: the right pixels, made once, whole again after damage, never all read."""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import logging
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.config import UserError
from pipelines.data.images import Decoding, decode
from pipelines.data.kept import Damaged
from pipelines.data.sources import FolderSource, Source
from pipelines.data.storage import Storage
from pipelines.train import images
from pipelines.train.images import ImageTable, Making, Preparation

HIGH, WIDE = 16, 24
CROP = functools.partial(ImageOps.fit, size=(WIDE, HIGH))
PREPARATION = Preparation(crop=CROP, size=(HIGH, WIDE), identity={"crop": "fit"})
HERE = Making(shard_rows=8, max_rejected=0.2, with_ray=False)
SMAPS = Path("/proc/self/smaps")


@dataclass
class Counted:
    """A source that says which keys were read, and may stop at one."""

    source: Source
    stop_at: str | None = None
    seen: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def index(self) -> pa.Table:
        return self.source.index()

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        if self.stop_at in keys:
            raise KeyboardInterrupt
        self.seen += keys
        return self.source.read(keys)


@pytest.fixture
def source(pictures: Path) -> Counted:
    return Counted(FolderSource(root=str(pictures)))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "storage"))


@pytest.fixture
def memory() -> Iterator[Storage]:
    storage = Storage.open(f"memory://energy-ood-{uuid.uuid4().hex}")
    yield storage
    fsspec.filesystem("memory").rm(storage.root, recursive=True)


def made(
    source: Source,
    storage: Storage,
    keys: Sequence[str] | None = None,
    *,
    preparation: Preparation = PREPARATION,
    making: Making = HERE,
) -> ImageTable:
    return images.make(
        source, storage, name="mine", keys=keys, preparation=preparation, making=making
    )


def files(table: ImageTable) -> dict[str, bytes]:
    folder = table.storage.local(*table.entry.folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expected(pictures: Path, keys: Sequence[str]) -> np.ndarray:
    return np.stack([np.asarray(CROP(decode((pictures / key).read_bytes()))) for key in keys])


class TestPixels:
    def test_they_are_those_of_the_crop_in_the_order_of_keys(
        self, source: Counted, storage: Storage, pictures: Path
    ) -> None:
        table = made(source, storage)
        keys = sorted(source.index()["key"].to_pylist())
        assert len(table) == 30
        assert table.size == (HIGH, WIDE)
        assert table.keys.to_pylist() == keys
        pixels = table.read(range(30))
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.numpy(), expected(pictures, keys))
        assert table.address == images.address_of(source, None, PREPARATION, 8)
        assert [path for path in files(table) if path.endswith(".arrow")] == [
            f"{number:05d}.arrow" for number in range(4)
        ]

    def test_rows_come_in_the_order_that_is_asked_for(
        self, source: Counted, storage: Storage
    ) -> None:
        table = made(source, storage)
        whole = table.read(range(30))
        rows = np.array([29, 0, 7, 8, 8, 15, 16, 3])
        assert torch.equal(table.read(rows), whole[rows])
        assert torch.equal(table.read(torch.from_numpy(rows)), whole[rows])
        assert table.read([]).shape == (0, HIGH, WIDE, 3)
        changed = table.read([4])
        changed += 1  # a copy: the file is not written to
        assert torch.equal(table.read([4]), whole[4:5])
        for wrong in ([30], [-1], [3, 40]):
            with pytest.raises(IndexError, match="give 0 to 29"):
                table.read(wrong)

    def test_an_id_is_made_of_the_key_alone(self, source: Counted, storage: Storage) -> None:
        table = made(source, storage)
        keys = table.keys.to_pylist()
        wanted = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
        assert table.ids.dtype == np.uint64
        assert table.ids.tolist() == wanted
        few = made(source, storage, keys[3:20:4])
        np.testing.assert_array_equal(few.ids, table.ids[3:20:4])

    def test_rows_are_found_by_key(self, source: Counted, storage: Storage) -> None:
        table = made(source, storage)
        keys = table.keys.to_pylist()
        rows = table.rows_of([keys[20], "nowhere.jpg", keys[0]])
        assert rows.dtype == np.int64
        assert rows.tolist() == [20, -1, 0]

    def test_more_images_than_a_worker_holds_at_a_time(
        self,
        source: Counted,
        storage: Storage,
        pictures: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(images, "READ_ROWS", 7)
        monkeypatch.setattr(images, "BLOCK_ROWS", 3)
        table = made(source, storage, making=replace(HERE, shard_rows=20))
        keys = table.keys.to_pylist()
        assert len(keys) == 30
        np.testing.assert_array_equal(table.read(range(30)).numpy(), expected(pictures, keys))

    def test_a_table_passes_to_another_process_as_its_address(
        self, source: Counted, storage: Storage
    ) -> None:
        table = made(source, storage)
        whole = table.read(range(30))
        sent = pickle.dumps(table)
        assert len(sent) < 1000
        assert torch.equal(pickle.loads(sent).read(range(30)), whole)


class TestAddress:
    def test_whatever_changes_a_pixel_changes_the_address(self, source: Counted) -> None:
        keys = source.index()["key"].to_pylist()

        def address(chosen: Sequence[str] | None = None, rows: int = 8, **changes: object) -> str:
            return images.address_of(source, chosen, replace(PREPARATION, **changes), rows)

        addresses = [
            address(),
            address(keys[:5]),
            address(keys[:6]),
            address(rows=9),
            address(identity={"crop": "other"}),
            address(size=(WIDE, HIGH)),
            address(how=Decoding(background="black")),
            address(code=("pipelines.backbones.input_step",)),
        ]
        assert len(set(addresses)) == len(addresses)
        assert address(keys[4::-1]) == address(keys[:5])
        assert address(crop=ImageOps.grayscale) == address()  # the identity speaks for it

    def test_what_is_there_is_not_made_again(self, source: Counted, storage: Storage) -> None:
        keys = source.index()["key"].to_pylist()
        first = made(source, storage, keys[:12])
        assert sorted(source.seen) == sorted(keys[:12])
        before, source.seen = files(first), []
        again = made(source, storage, keys[11::-1])
        assert source.seen == []
        assert files(again) == before


Harm = Callable[[Path], None]


def cut(folder: Path) -> None:
    path = folder / "00001.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def missing(folder: Path) -> None:
    (folder / "00001.arrow").unlink()


def flipped(folder: Path) -> None:
    path = folder / "00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_receipt(folder: Path) -> None:
    (folder / "00001.json").unlink()


def flipped_receipt(folder: Path) -> None:
    path = folder / "00001.json"
    path.write_text(path.read_text().replace('"rows": 8', '"rows": 7'))


HARMS = [cut, missing, flipped, without_receipt, flipped_receipt]


class TestAgain:
    def test_a_stopped_start_goes_on_where_it_stopped(
        self, source: Counted, storage: Storage, tmp_path: Path
    ) -> None:
        keys = sorted(source.index()["key"].to_pylist())
        source.stop_at = keys[17]
        with pytest.raises(KeyboardInterrupt):
            made(source, storage)
        assert sorted(source.seen) == keys[:16]
        address = images.address_of(source, None, PREPARATION, 8)
        with pytest.raises(Damaged, match=r"manifest.json: missing"):
            len(ImageTable(storage, address))
        source.stop_at, source.seen, told = None, [], []
        table = made(
            source, storage, making=replace(HERE, on_progress=lambda *counts: told.append(counts))
        )
        assert source.seen == keys[16:]
        assert told == [(8, 30, 0), (16, 30, 0), (24, 30, 0), (30, 30, 0)]
        other = made(source, Storage.open(str(tmp_path / "undisturbed")))
        assert files(table) == files(other)

    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize("harm", HARMS)
    def test_a_damaged_shard_is_made_again_and_no_other(
        self,
        source: Counted,
        storage: Storage,
        caplog: pytest.LogCaptureFixture,
        harm: Harm,
        finished: bool,
    ) -> None:
        table = made(source, storage)
        before, source.seen = files(table), []
        folder = storage.local(*table.entry.folder)
        if not finished:
            (folder / "manifest.json").unlink()
        harm(folder)
        with caplog.at_level(logging.WARNING):
            again = made(source, storage)
        assert source.seen == sorted(source.index()["key"].to_pylist())[8:16]
        assert files(again) == before
        if finished or harm is not without_receipt:
            assert "removed and made again" in caplog.text

    @pytest.mark.parametrize("harm", [cut, missing, flipped])
    def test_a_check_names_the_damaged_file(
        self, source: Counted, storage: Storage, harm: Harm
    ) -> None:
        table = made(source, storage)
        table.check()
        harm(storage.local(*table.entry.folder))
        with pytest.raises(Damaged, match=r"00001\.arrow: ") as caught:
            table.check()
        assert (*table.entry.folder, "00001.arrow") in caught.value.bad

    @pytest.mark.parametrize("harm", [cut, missing])
    def test_opening_sees_a_file_of_another_size(
        self, source: Counted, storage: Storage, harm: Harm
    ) -> None:
        table = made(source, storage)
        harm(storage.local(*table.entry.folder))
        with pytest.raises(Damaged, match=r"00001\.arrow: ") as caught:
            table.read([0])
        assert caught.value.bad == (
            (*table.entry.folder, "00001.arrow"),
            (*table.entry.folder, "manifest.json"),
        )

    def test_opening_sees_what_is_no_arrow_file(self, source: Counted, storage: Storage) -> None:
        table = made(source, storage)
        path = storage.local(*table.entry.folder, "00002.arrow")
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(Damaged, match=r"00002\.arrow: not readable"):
            table.read([0])

    def test_two_files_that_changed_places_are_noticed(
        self, source: Counted, storage: Storage
    ) -> None:
        table = made(source, storage)
        before = files(table)
        folder = storage.local(*table.entry.folder)
        (folder / "00000.arrow").write_bytes(before["00001.arrow"])
        (folder / "00001.arrow").write_bytes(before["00000.arrow"])
        with pytest.raises(Damaged):
            table.check()
        assert files(made(source, storage)) == before


@dataclass(frozen=True)
class Some:
    """A source of given contents."""

    contents: dict[str, bytes]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(sorted(self.contents.items())).encode()).hexdigest()

    def index(self) -> pa.Table:
        return pa.table({"key": pa.array(sorted(self.contents), pa.string())})

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        return [self.contents[key] for key in keys]


def picture(size: tuple[int, int] = (WIDE, HIGH), grey: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (grey, 1, 2)).save(content, "bmp")
    return content.getvalue()


class TestRejected:
    def test_bad_images_are_left_out_and_named(self, storage: Storage) -> None:
        contents = {f"{number:02d}": picture(grey=number) for number in range(20)}
        bad = {"03": b"", "08": b"no picture", "09": b""}
        told: list[tuple[int, int, int]] = []
        making = Making(
            shard_rows=2,
            max_rejected=0.15,
            with_ray=False,
            on_progress=lambda *counts: told.append(counts),
        )
        table = made(Some({**contents, **bad}), storage, making=making)  # of one shard nothing
        good = sorted(contents.keys() - bad)
        assert table.keys.to_pylist() == good
        assert table.read(range(17))[:, 0, 0, 0].tolist() == [int(key) for key in good]
        assert table.manifest.rejected == 3
        rows = table.rejected().to_pylist()
        assert [(row["key"], row["reason"]) for row in rows] == [
            ("03", "empty"),
            ("08", "not_an_image"),
            ("09", "empty"),
        ]
        assert told[-1] == (20, 20, 3)

    def test_too_many_of_them_stop_it(self, storage: Storage) -> None:
        contents = {f"{number:02d}": picture() for number in range(20)}
        source = Some({**contents, "03": b"", "08": b"no picture"})
        with pytest.raises(UserError, match=r"source mine: 2 of 20 .*max_rejected=0\.05.*03: "):
            made(source, storage, making=replace(HERE, max_rejected=0.05))

    def test_none_that_is_left_stops_it_too(self, storage: Storage) -> None:
        with pytest.raises(UserError, match="none is left"):
            made(Some({"a": b"", "b": b""}), storage, making=replace(HERE, max_rejected=1))


class TestRefused:
    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ([], "source mine: no image chosen"),
            (["class_0/000.jpg", "class_0/nowhere.jpg"], r"1 of 2 chosen keys .*nowhere\.jpg"),
            (["class_0/000.jpg", "class_0/000.jpg"], r"1 keys chosen twice .*000\.jpg"),
        ],
    )
    def test_a_choice_that_is_none(
        self, source: Counted, storage: Storage, keys: list[str], said: str
    ) -> None:
        with pytest.raises(UserError, match=said):
            made(source, storage, keys)
        assert not storage.exists("cache")

    def test_a_source_without_an_image(self, storage: Storage) -> None:
        with pytest.raises(UserError, match="source mine: no image"):
            made(Some({}), storage)

    def test_a_crop_of_another_size(self, source: Counted, storage: Storage) -> None:
        other = replace(PREPARATION, size=(WIDE, HIGH))
        with pytest.raises(
            UserError, match=r"class_0/000\.jpg: the crop gave pixels \(16, 24, 3\)"
        ):
            made(source, storage, preparation=other)


def mapped_bytes(folder: Path) -> int:
    """What of the files in a folder this process has in memory through its maps."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # the line that begins a map
            inside = str(folder) in rest
        elif inside and name == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux: what of a map is in memory")
def test_memory_holds_what_is_read_and_not_the_table(storage: Storage) -> None:
    content, side = picture((96, 96)), 96
    source = Some({f"{number:05d}": content for number in range(1536)})
    how = Preparation(crop=ImageOps.exif_transpose, size=(side, side), identity={"crop": "none"})
    table = made(source, storage, preparation=how, making=replace(HERE, shard_rows=512))
    folder = storage.local(*table.entry.folder)
    pixels = len(table) * side * side * 3
    assert pixels > 40e6
    assert len(table.ids) == len(table.keys) == 1536  # opened, keys read
    opened = mapped_bytes(folder)
    assert 0 < opened < pixels / 2
    table.read([5, 700, 1500])
    few = mapped_bytes(folder)
    # The kernel maps a piece of at most 2 MiB around a byte, and an image may lie in two.
    assert few < opened + 3 * 2 * 2**21
    table.read(range(1536))
    assert mapped_bytes(folder) > 0.95 * pixels  # the measure sees what is read
    del table
    gc.collect()
    assert mapped_bytes(folder) == 0


class TestElsewhere:
    def test_the_files_of_a_store_are_copied_and_the_copies_go(
        self,
        source: Counted,
        storage: Storage,
        memory: Storage,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        here, there = made(source, storage), made(source, memory)
        assert torch.equal(there.read(range(30)), here.read(range(30)))
        (copies,) = tmp_path.glob("images-*")
        assert len(list(copies.iterdir())) == 4
        del there
        gc.collect()
        assert not copies.exists()

    def test_a_copy_is_what_was_written(self, source: Counted, memory: Storage) -> None:
        table = made(source, memory)
        place = (*table.entry.folder, "00001.arrow")
        content = bytearray(memory.read_bytes(*place))
        content[1000] ^= 1
        memory.write_bytes(bytes(content), *place)
        with pytest.raises(Damaged, match=r"00001\.arrow: not the bytes"):
            table.read([0])
        memory.remove(*place)
        with pytest.raises(Damaged, match=r"00001\.arrow: missing"):
            ImageTable(memory, table.address).read([0])
        assert len(made(source, memory).read([29])) == 1
