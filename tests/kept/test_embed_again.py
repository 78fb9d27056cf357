"""What `embed` and the trainings do with damaged work of their own: it is made again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.features import FeatureCache
from pipelines.data.kept import Damaged
from pipelines.data.sources import FolderSource
from pipelines.data.storage import Storage
from pipelines.embed import stage as embed
from pipelines.embed.workers import ShardEncoder, ShardReceipt, Work
from pipelines.finetune import workers
from pipelines.finetune.cache import load_predictor
from pipelines.finetune.loop import TrainingJob
from pipelines.finetune.stage import train
from pipelines.methods import METHODS
from tests.feature_cache import flip_a_byte
from tests.ray.small_backbone import files, write_backbone
from tests.small_clip import toy_data


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that were encoded, in this process."""
    shards: list[int] = []

    def in_this_process(rows: list, plans: dict, work: Work, _: object) -> Iterator[ShardReceipt]:
        shards.extend(row.shard for row in rows)
        actor = ShardEncoder(work, {name: plan.source for name, plan in plans.items()})
        receipts = actor(pa.concat_tables([row.table() for row in rows]))["receipt"]
        yield from map(ShardReceipt.model_validate_json, receipts.to_pylist())

    monkeypatch.setattr(embed, "_encode_shards", in_this_process)
    return shards


@pytest.fixture
def again(pictures: Path, backbone_files: dict[str, tuple[Path, Path]], tmp_path: Path):
    config, weights = backbone_files["vit"]
    backbone = BackboneConfig(name="tiny", config=str(config), path=str(weights))

    def run() -> FeatureCache:
        return embed.embed_source(
            FolderSource(root=str(pictures)),
            "mine",
            backbone,
            Storage.open(str(tmp_path / "storage")),
            settings=embed.EmbedConfig(shard_rows=8, batch_size=4),
            compute=ComputeConfig(),
        )

    return run


def contents(cache: FeatureCache) -> dict[str, bytes]:
    folder = cache.storage.local("cache", "features", cache.address)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("finished", [True, False])
def test_a_flipped_shard_is_made_again_and_no_other(again, made: list[int], finished) -> None:
    """Without a manifest the next embed took it for good; with one it said found for ever."""
    cache = again()
    before = contents(cache)
    assert made == [0, 1, 2, 3]
    keys = cache.keys().to_pylist()
    flip_a_byte(cache, float(cache.load(keys[9:10])[0, 0]), shard=1)
    with pytest.raises(Damaged, match=r"00001\.parquet: not the bytes that were written"):
        cache.load(keys)
    if not finished:
        Path(cache.path("manifest.json")).unlink()
    made.clear()
    assert contents(again()) == before
    assert made == [1]


@pytest.mark.parametrize("name", ["00002.parquet", "rejected.parquet", "manifest.json"])
def test_a_file_that_was_cut_is_made_again(again, made: list[int], name: str) -> None:
    cache = again()
    before = contents(cache)
    Path(cache.path(name)).write_bytes(before[name][:-9])
    made.clear()
    assert contents(again()) == before
    assert made == ([2] if name == "00002.parquet" else [])


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:99] + b"?" + c[100:]])
def test_a_damaged_checkpoint_starts_the_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage
) -> None:
    backbone, storage = write_backbone(tmp_path), Storage(str(tmp_path / "storage"))
    job = TrainingJob(METHODS["coop"].Config(training={"epochs": 3}), 0)

    def trained() -> str:
        (head,) = train(
            [job], toy_data(), backbone, storage, compute=ComputeConfig(), mode="in_process"
        )
        return head

    head = trained()
    expected = files(storage, head)
    storage.local("cache", "heads", head, "manifest.json").unlink()
    path = storage.local("cache", "heads", head, "checkpoint.pt")
    path.write_bytes(damage(path.read_bytes()))
    epochs: list[int] = []
    save = workers.save_checkpoint
    monkeypatch.setattr(workers, "save_checkpoint", lambda *given: epochs.append(1) or save(*given))
    assert trained() == head
    assert files(storage, head) == expected
    assert len(epochs) == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "checkpoint.pt: not the bytes that were written here; it is removed" in line


def test_another_head_in_a_heads_place_is_refused(tmp_path: Path) -> None:
    backbone, storage = write_backbone(tmp_path), Storage(str(tmp_path / "storage"))
    jobs = [TrainingJob(METHODS["coop"].Config(training={"epochs": 1}), seed) for seed in (0, 1)]
    one, two = train(
        jobs, toy_data(), backbone, storage, compute=ComputeConfig(), mode="in_process"
    )
    place, other = (storage.local("cache", "heads", head) for head in (one, two))
    for name in ("best/head.safetensors", "manifest.json"):  # even with its manifest
        (place / name).write_bytes((other / name).read_bytes())
        with pytest.raises(Damaged, match="not the bytes that were written here"):
            load_predictor(storage, one)
