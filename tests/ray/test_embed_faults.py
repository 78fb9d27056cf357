"""Nothing lost, nothing twice: workers, nodes and drivers killed in the middle of a run.

The images are slow to read, so that there is a middle to kill in. Every end is compared with an
undisturbed run: the same keys, the same bytes in every shard.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray import cloudpickle

from pipelines.backbones.clip import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.data import features
from pipelines.data.features import FeatureCache
from pipelines.data.sources import FolderSource
from pipelines.data.storage import Storage
from pipelines.embed import stage as embed
from pipelines.embed.stage import EmbedConfig

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
SETTINGS = EmbedConfig(batch_size=2, shard_rows=3)
COMPUTE = ComputeConfig(num_cpus=4, embed_workers=2)
NUM_SHARDS = 10


class SlowSource(FolderSource):
    """Takes its time, and notes which process read which shard."""

    notes: str
    seconds: float = 0.4

    def read(self, keys: list[str]) -> list[bytes | Exception]:
        with Path(self.notes).open("a") as file:
            file.write(json.dumps([os.getpid(), keys[0]]) + "\n")
        time.sleep(self.seconds)
        return super().read(keys)


@pytest.fixture(scope="module")
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    architecture, weights = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(architecture), path=str(weights))


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None,
    pictures: Path,
    backbone: BackboneConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    """The bytes of every shard of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = SlowSource(root=str(pictures), notes=str(folder / "notes"), seconds=0)
    return shards(go(source, backbone, folder))


@pytest.fixture
def slow(pictures: Path, tmp_path: Path) -> SlowSource:
    return SlowSource(root=str(pictures), notes=str(tmp_path / "notes"))


def go(source: SlowSource, backbone: BackboneConfig, folder: Path) -> FeatureCache:
    storage = Storage.open(str(folder / "storage"))
    return embed.embed_source(source, "slow", backbone, storage, settings=SETTINGS, compute=COMPUTE)


def shards(cache: FeatureCache) -> dict[str, bytes]:
    assert cache.manifest.rows == 30
    return {s.file: Path(cache.path(s.file)).read_bytes() for s in cache.manifest.shards}


def notes(source: SlowSource) -> list[tuple[int, str]]:
    path = Path(source.notes)
    if not path.exists():
        return []
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def num_finished(folder: Path) -> int:
    return len(list((folder / "storage").rglob("0*.parquet")))


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the run never came so far"
        time.sleep(0.05)


def test_a_killed_worker_costs_only_its_shard(
    undisturbed: dict[str, bytes], slow: SlowSource, backbone: BackboneConfig, tmp_path: Path
) -> None:
    def kill() -> None:
        wait_until(lambda: num_finished(tmp_path) >= 3)
        os.kill(notes(slow)[-1][0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    cache = go(slow, backbone, tmp_path)
    killer.join()
    assert shards(cache) == undisturbed
    begun = [key for _, key in notes(slow)]
    assert len(set(begun)) == NUM_SHARDS
    assert NUM_SHARDS < len(begun) <= NUM_SHARDS + 3  # the kill hit work that was done again


DRIVER = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_embed_faults import COMPUTE, SlowSource, go
from pipelines.compute.cluster import connect
from pipelines.backbones.clip import BackboneConfig
source = SlowSource.model_validate_json({source!r})
backbone = BackboneConfig.model_validate_json({backbone!r})
with connect(COMPUTE):
    go(source, backbone, Path({place!r}))
"""


@pytest.fixture
def driver(
    slow: SlowSource, backbone: BackboneConfig, tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a run in a process group of its own; all of them are gone at the end."""
    script = DRIVER.format(
        folder=str(Path(__file__).parent),
        source=slow.model_dump_json(),
        backbone=backbone.model_dump_json(),
        place=str(tmp_path),
    )
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(
    undisturbed: dict[str, bytes],
    slow: SlowSource,
    backbone: BackboneConfig,
    tmp_path: Path,
    driver: Callable[[], subprocess.Popen[bytes]],
) -> None:
    process = driver()
    wait_until(lambda: num_finished(tmp_path) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: _gone({pid for pid, _ in notes(slow)}))
    folder = next((tmp_path / "storage").rglob("00*.parquet")).parent
    done = features.finished_shards(Storage.open(str(tmp_path / "storage")), folder.name)
    assert 3 <= len(done) < NUM_SHARDS
    before = len(notes(slow))
    cache = go(slow, backbone, tmp_path)
    assert shards(cache) == undisturbed
    assert len(notes(slow)) - before == NUM_SHARDS - len(done)  # none of them twice


@pytest.mark.slow
def test_two_runs_at_once_share_one_cache(
    undisturbed: dict[str, bytes],
    slow: SlowSource,
    backbone: BackboneConfig,
    tmp_path: Path,
    driver: Callable[[], subprocess.Popen[bytes]],
) -> None:
    other = driver()
    wait_until(lambda: num_finished(tmp_path) >= 1)
    cache = go(slow, backbone, tmp_path)
    assert shards(cache) == undisturbed
    assert other.wait(timeout=120) == 0
    assert shards(FeatureCache(cache.storage, cache.address)) == undisturbed
    keys = cache.keys().to_pylist()
    assert len(set(keys)) == 30
    assert cache.load(keys).shape == (30, 16)  # checks every shard against the manifest


def _gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)
