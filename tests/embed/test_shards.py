"""The two halves of a shard without an engine: apart and together they write the same bytes."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.backbones.description import BackboneConfig
from pipelines.data.features import FeatureCache, finish, inspect_shard
from pipelines.data.images import Decoding
from pipelines.data.sources import FolderSource
from pipelines.data.storage import Storage
from pipelines.embed.workers import PLAN, PREPARED, Encoding, ShardEncoder, ShardPreparer, Work

KEYS = [f"class_{number % 3}/{number:03d}.jpg" for number in (0, 3, 6, 9, 12, 15, 18)]


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> FolderSource:
    for key in KEYS:
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((pictures / key).read_bytes())
    (tmp_path / "images" / KEYS[2]).write_bytes(b"")
    return FolderSource(root=str(tmp_path / "images"))


@pytest.mark.parametrize("extra", [False, True])
def test_decoding_apart_changes_no_byte(
    source: FolderSource,
    backbone_files: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    extra: bool,
) -> None:
    architecture, weights = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(architecture), path=str(weights))
    sources = {"mine": source}
    written = []
    for place in ("together", "apart"):
        storage = Storage.open(str(tmp_path / place))
        encodings = {"mine": Encoding(backbone, Decoding(), extra)}
        work = Work(encodings, storage, 4, threads=1, device="cpu")
        row = {"name": "mine", "address": "abc", "shard": 3, "keys": KEYS}
        table = pa.Table.from_pylist([row], schema=PLAN)
        if place == "apart":
            table = ShardPreparer(work, sources)(table)
            assert table.schema.equals(PREPARED)
        ShardEncoder(work, sources)(table)
        path = tmp_path / place / "cache" / "features" / "abc" / "00003.parquet"
        written.append(path.read_bytes())
    assert written[0] == written[1]
    receipt = inspect_shard(storage, "abc", 3)
    assert receipt.rows == 6
    assert [row[:2] for row in receipt.rejected] == [(KEYS[2], "empty")]


def test_columns_come_back_in_shape(
    source: FolderSource, backbone_files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    architecture, weights = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(architecture), path=str(weights))
    storage = Storage.open(str(tmp_path / "storage"))
    encodings = {"mine": Encoding(backbone, Decoding(), local_features=True)}
    work = Work(encodings, storage, 4, threads=2, device="cpu")
    row = {"name": "mine", "address": "abc", "shard": 0, "keys": KEYS}
    ShardEncoder(work, {"mine": source})(pa.Table.from_pylist([row], schema=PLAN))
    receipt = inspect_shard(storage, "abc", 0)
    finish(storage, "abc", receipts=[receipt], bounds=[(KEYS[0], KEYS[-1])], about={})
    cache = FeatureCache(storage, "abc")
    keys = [KEYS[5], KEYS[0]]
    assert cache.load(keys).shape == (2, 16)
    assert cache.load(keys, "local_features").shape == (2, 16, 16)
