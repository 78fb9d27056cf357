import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray import cloudpickle

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.backbones.input_step import InputStep
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.features import FeatureCache, Receipt
from pipelines.data.index_table import as_index
from pipelines.data.sources import FolderSource
from pipelines.data.storage import Storage
from pipelines.embed import stage as embed
from pipelines.embed.config import EmbedConfig
from pipelines.embed.plan import Plan
from pipelines.embed.text import text_features
from pipelines.embed.workers import ShardEncoder, ShardReceipt, Work
from pipelines.ood import ODIN

COMPUTE = ComputeConfig(num_cpus=4, embed_workers=2)
SETTINGS = EmbedConfig(batch_size=4, shard_rows=8, max_rejected=0.5)


@dataclass(frozen=True)
class Memory:
    """The smallest source: pairs of key and content."""

    rows: tuple[tuple[str, bytes], ...]

    def fingerprint(self) -> str:
        return str(hash(self.rows))

    def index(self) -> pa.Table:
        return as_index(pa.table({"key": pa.array([key for key, _ in self.rows], pa.string())}))

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        content = dict(reversed(self.rows))
        return [content[key] for key in keys]


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


@pytest.fixture(scope="module")
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    architecture, weights = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(architecture), path=str(weights))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "storage"))


def run(source: object, backbone: BackboneConfig, storage: Storage, **more: object) -> FeatureCache:
    options = {"settings": SETTINGS, "compute": COMPUTE, **more}
    return embed.embed_source(source, "mine", backbone, storage, **options)


@dataclass(frozen=True)
class FirstRun:
    """Three sources through one pool of two actors."""

    storage: Storage
    caches: dict[str, FeatureCache]
    seen: list[tuple[int, int, int]]


def mixed(pictures: Path) -> Memory:
    """Ten images of which two are bad."""
    good = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))]
    rows = [(f"{n:02d}", content) for n, content in enumerate(good[:10])]
    rows[3] = ("03", good[3][:300])
    rows[7] = ("07", b"")
    return Memory(tuple(rows))


@pytest.fixture(scope="module")
def first_run(
    ray_cluster: None,
    pictures: Path,
    backbone: BackboneConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> FirstRun:
    storage = Storage.open(str(tmp_path_factory.mktemp("storage")))
    source = FolderSource(root=str(pictures))
    sources = {"all": source, "some": source, "mixed": mixed(pictures)}
    seen: list[tuple[int, int, int]] = []
    caches = embed.embed_sources(
        sources,
        backbone,
        storage,
        settings=SETTINGS,
        compute=COMPUTE,
        keys={"some": source.index()["key"].to_pylist()[::5]},
        on_progress=lambda *counts: seen.append(counts),
    )
    return FirstRun(storage, caches, seen)


def test_features_are_those_of_one_process(
    first_run: FirstRun, pictures: Path, backbone: BackboneConfig
) -> None:
    source = FolderSource(root=str(pictures))
    keys = source.index()["key"].to_pylist()
    threads = torch.get_num_threads()
    torch.set_num_threads(COMPUTE.embed_threads)
    loaded = network.load(backbone)
    parts = [keys[i : i + 8] for i in range(0, 30, 8)]
    batches = [Preparer(loaded.crop).batches(part, source.read(part), 4) for part in parts]
    expected = [Encoder(loaded, 4).encode(part).columns["feature"] for part in batches]
    torch.set_num_threads(threads)
    cache = first_run.caches["all"]
    assert np.array_equal(cache.load(keys), np.concatenate(expected))  # bit for bit
    assert np.array_equal(cache.load(keys[::-3]), cache.load(keys)[::-3])
    assert cache.keys().to_pylist() == keys
    assert cache.rejected().num_rows == 0
    assert [shard.rows for shard in cache.manifest.shards] == [8, 8, 8, 6]


def test_progress_counts_every_image(first_run: FirstRun) -> None:
    done = [counts[0] for counts in first_run.seen]
    assert done == sorted(done)
    assert first_run.seen[-1] == (30 + 6 + 10, 30 + 6 + 10, 2)


def test_chosen_keys_are_an_entry_of_their_own(first_run: FirstRun) -> None:
    whole, some = first_run.caches["all"], first_run.caches["some"]
    assert whole.address != some.address
    keys = whole.keys().to_pylist()
    np.testing.assert_allclose(some.load(keys[::5]), whole.load(keys[::5]), rtol=0, atol=1e-6)
    assert not some.present([keys[1]]).any()


def test_bad_images_are_listed_and_the_rest_embedded(
    first_run: FirstRun, pictures: Path, backbone: BackboneConfig
) -> None:
    cache = first_run.caches["mixed"]
    keys = [f"{n:02d}" for n in range(10)]
    assert cache.rejected().select(["key", "reason"]).to_pylist() == [
        {"key": "03", "reason": "truncated"},
        {"key": "07", "reason": "empty"},
    ]
    assert cache.present(keys).tolist() == [n not in (3, 7) for n in range(10)]
    assert cache.manifest.rows == 8
    assert cache.manifest.rejected == 2
    with pytest.raises(UserError, match="1 of 2 keys have no feature"):
        cache.load(["02", "03"])
    # The finished shards count against a stricter bound without any new work.
    (first_run.storage.local("cache", "features", cache.address) / "manifest.json").unlink()
    stricter = SETTINGS.model_copy(update={"max_rejected": 0.1})
    with pytest.raises(UserError, match=r"2 of 10 images.*max_rejected=0\.1.*1 empty"):
        run(mixed(pictures), backbone, first_run.storage, settings=stricter)


@pytest.mark.slow
def test_a_pass_with_an_input_step_goes_the_same_way(
    first_run: FirstRun, pictures: Path, backbone: BackboneConfig
) -> None:
    source = FolderSource(root=str(pictures))
    keys = source.index()["key"].to_pylist()[:10]
    text = np.eye(3, 16, dtype=np.float32)
    step = InputStep(ODIN.fit(text, tau=5.0), eps=0.02)
    cache = run(source, backbone, first_run.storage, keys=keys, pixel_pass=step)
    plain = first_run.caches["all"]
    assert cache.address not in {cache.address for cache in first_run.caches.values()}
    threads = torch.get_num_threads()
    torch.set_num_threads(COMPUTE.embed_threads)
    loaded = network.load(backbone)
    encoder = Encoder(loaded, 4, pixel_pass=step)
    parts = [keys[:8], keys[8:]]
    batches = [Preparer(loaded.crop).batches(part, source.read(part), 4) for part in parts]
    expected = np.concatenate([encoder.encode(part).columns["feature"] for part in batches])
    torch.set_num_threads(threads)
    assert np.array_equal(cache.load(keys), expected)  # bit for bit
    assert np.abs(expected - plain.load(keys)).max() > 1e-3


@pytest.mark.slow
def test_only_missing_shards_are_made(
    first_run: FirstRun, pictures: Path, backbone: BackboneConfig
) -> None:
    cache = first_run.caches["all"]
    folder = first_run.storage.local("cache", "features", cache.address)
    shards = [f"{number:05d}.parquet" for number in range(4)]
    in_tasks = SETTINGS.model_copy(update={"decode": "tasks"})  # the other way, the same bytes
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {name: (folder / name).stat().st_mtime_ns for name in shards}
    assert set(before) == {*shards, "manifest.json", "rejected.parquet"}
    (folder / "manifest.json").unlink()
    (folder / "00002.parquet").unlink()
    (folder / ".00002.parquet.abc.tmp").write_bytes(b"half a file")
    source = FolderSource(root=str(pictures))
    again = run(source, backbone, first_run.storage, settings=in_tasks)
    assert again.address == cache.address
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}
    assert after == before
    for name in (shards[0], shards[1], shards[3]):
        assert (folder / name).stat().st_mtime_ns == times[name]


def test_a_finished_cache_needs_no_ray(
    pictures: Path, backbone: BackboneConfig, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(root=str(pictures))

    def in_this_process(rows: list, plans: dict, work: Work, _layout: object) -> object:
        actor = ShardEncoder(work, {name: plan.source for name, plan in plans.items()})
        table = actor(pa.concat_tables([row.table() for row in rows]))
        yield from map(ShardReceipt.model_validate_json, table["receipt"].to_pylist())

    monkeypatch.setattr(embed, "_encode_shards", in_this_process)
    first = run(source, backbone, storage)
    monkeypatch.setattr(embed, "_encode_shards", None)
    assert run(source, backbone, storage) == first
    (storage.local("cache", "features", first.address) / "manifest.json").unlink()
    assert run(source, backbone, storage).manifest == first.manifest
    shard = storage.local("cache", "features", first.address) / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="not the bytes that were written"):
        first.load(source.index()["key"].to_pylist())


def test_the_address_follows_everything_that_changes_a_byte(
    pictures: Path,
    backbone: BackboneConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = Storage.open(str(tmp_path / "storage"))
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    source = FolderSource(root=str(copy))
    keys = source.index()["key"].to_pylist()

    def address(**more: object) -> str:
        plans: dict[str, Plan] = {}

        def stop(made: dict[str, Plan], *_: object) -> None:
            plans.update(made)
            raise UserError("planned")

        options = {"backbone": backbone, "keys": None, **more}
        chosen = options.pop("backbone")
        monkeypatch.setattr(embed, "_run", stop)
        with pytest.raises(UserError, match="planned"):
            run(source, chosen, storage, **options)
        return plans["mine"].address

    base = address()
    assert address() == base
    same = SETTINGS.model_copy(update={"max_rejected": 0.01, "decode": "tasks"})
    assert address(settings=same) == base  # say when to stop and where to work
    others = [
        address(settings=SETTINGS.model_copy(update={field: value}))
        for field, value in (
            ("batch_size", 5),
            ("shard_rows", 9),
            ("background", "black"),
            ("exif", "apply"),
            ("max_pixels", 10),
            ("local_features", True),
        )
    ]
    others.append(address(backbone=backbone.model_copy(update={"precision": "bf16"})))
    others.append(address(keys=keys[:3]))
    others.append(address(keys=keys[:2]))
    others.append(address(compute=ComputeConfig(embed_gpus=1)))
    (copy / "class_0" / "extra.jpg").write_bytes((copy / keys[0]).read_bytes())
    others.append(address())
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["nobody"], "1 of 1 chosen keys are not in it .first: nobody"),
        ([], "no image chosen"),
        (["a", "a"], "1 keys chosen twice .first: a"),
    ],
)
def test_mistakes_in_the_choice_of_keys(
    keys: list[str], message: str, backbone: BackboneConfig, storage: Storage
) -> None:
    with pytest.raises(UserError, match=message):
        run(Memory((("a", b""), ("b", b""))), backbone, storage, keys=keys)


def test_empty_and_hopeless_sources(
    backbone: BackboneConfig, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="source mine: no image"):
        run(Memory(()), backbone, storage)

    def all_bad(rows: list, *_: object) -> object:
        for row in rows:
            bad = tuple((key, "empty", "no bytes") for key in row.keys)
            yield ShardReceipt(name="mine", receipt=Receipt(row.shard, 0, 0, "", bad, {}))

    monkeypatch.setattr(embed, "_encode_shards", all_bad)
    settings = EmbedConfig(max_rejected=1)
    with pytest.raises(UserError, match=r"2 of 2 images cannot be used, none is left.*2 empty"):
        run(Memory((("a", b""), ("b", b""))), backbone, storage, settings=settings)


def test_text_features_are_normalised_means_of_unit_features(
    backbone: BackboneConfig, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = text_features(["cat", "dog"], ["a {}.", "{}"], backbone, storage)
    loaded = network.load(backbone)
    for row, texts in enumerate((["a cat.", "cat"], ["a dog.", "dog"])):
        mean = np.mean([loaded.encode_text([text])[0].numpy() for text in texts], axis=0)
        np.testing.assert_allclose(features[row], mean / np.linalg.norm(mean), atol=1e-6)
    monkeypatch.setattr(embed.network, "load", None)
    again = text_features(["cat", "dog"], ["a {}.", "{}"], backbone, storage)
    assert np.array_equal(again, features)


@pytest.mark.slow
def test_an_engine_gives_the_same_features_under_an_address_of_their_own(
    ray_cluster: None,
    backbone_files: dict[str, tuple[Path, Path]],
    pictures: Path,
    storage: Storage,
) -> None:
    architecture, weights = backbone_files["resnet"]
    backbone = BackboneConfig(name="tiny", config=str(architecture), path=str(weights))
    source = mixed(pictures)
    one = {"compute": ComputeConfig(num_cpus=4, embed_workers=1)}
    of_torch = run(source, backbone, storage, **one)
    settings = SETTINGS.model_copy(update={"engine": "onnxruntime"})
    cache = run(source, backbone, storage, settings=settings, **one)
    assert cache.address != of_torch.address
    features, expected = (c.load(c.keys().to_pylist()) for c in (cache, of_torch))
    assert features.shape == expected.shape == (8, 16)
    assert np.abs(features - expected).max() < 1e-5
    assert not np.array_equal(features, expected)  # it was the engine
    with pytest.raises(UserError, match=r"compute\.embed_gpus=0"):
        run(source, backbone, storage, settings=settings, compute=ComputeConfig(embed_gpus=1))
    local = settings.model_copy(update={"local_features": True})
    with pytest.raises(UserError, match="gives no local features"):
        run(source, backbone, storage, settings=local)
