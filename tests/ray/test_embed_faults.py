"""Nothing lost, nothing twice: workers, nodes and drivers killed in the middle of a run.

Each is held inside a shard when it is killed (`tests.barrier`). Every end is compared with an
undisturbed run: the same keys, the same bytes in every shard.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from pipelines.embed.config import EmbedConfig
from tests.barrier import Barrier, gone, wait_until
from tests.patience import PATIENCE
from tests.ray.processes import descendants

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
SETTINGS = EmbedConfig(batch_size=2, shard_rows=3)
COMPUTE = ComputeConfig(num_cpus=4, embed_workers=2)
NUM_SHARDS = 10


# The second shard that is finished, or a later one, waits just before it takes its name.
SHARD = "cache/features/*/0*.parquet"


class NotingSource(FolderSource):
    """Notes which process read which shard."""

    notes: str

    def read(self, keys: list[str]) -> list[bytes | Exception]:
        with Path(self.notes).open("a") as file:
            file.write(json.dumps([os.getpid(), keys[0]]) + "\n")
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
    source = NotingSource(root=str(pictures), notes=str(folder / "notes"))
    return shards(go(source, backbone, folder))


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> NotingSource:
    return NotingSource(root=str(pictures), notes=str(tmp_path / "notes"))


def go(
    source: NotingSource, backbone: BackboneConfig, folder: Path, storage: Storage | None = None
) -> FeatureCache:
    storage = storage or Storage.open(str(folder / "storage"))
    return embed.embed_source(
        source, "noting", backbone, storage, settings=SETTINGS, compute=COMPUTE
    )


def num_finished(folder: Path) -> int:
    return len(list((folder / "storage").glob(SHARD)))


def barrier_in(folder: Path, node: str = "") -> Barrier:
    return Barrier.new(folder / "barrier", held=SHARD, after=SHARD, node=node)


def held_storage(folder: Path, barrier: Barrier) -> Storage:
    return barrier.storage(str(folder / "storage"))


def shards(cache: FeatureCache) -> dict[str, bytes]:
    assert cache.manifest.rows == 30
    return {s.file: Path(cache.path(s.file)).read_bytes() for s in cache.manifest.shards}


def notes(source: NotingSource) -> list[tuple[int, str]]:
    path = Path(source.notes)
    if not path.exists():
        return []
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_worker_costs_only_its_shard(
    undisturbed: dict[str, bytes],
    source: NotingSource,
    backbone: BackboneConfig,
    barrier: Barrier,
    tmp_path: Path,
) -> None:
    killed = []

    def kill() -> None:
        killed.append(barrier.arrived())
        os.kill(killed[0], signal.SIGKILL)
        barrier.open()

    killer = threading.Thread(target=kill)
    killer.start()
    cache = go(source, backbone, tmp_path, held_storage(tmp_path, barrier))
    killer.join()
    assert shards(cache) == undisturbed
    begun = [key for _, key in notes(source)]
    assert len(set(begun)) == NUM_SHARDS
    assert len(begun) == NUM_SHARDS + 1  # the shard that it was in was done again
    (lost,) = {key for key in begun if begun.count(key) == 2}
    assert [pid == killed[0] for pid, key in notes(source) if key == lost] == [True, False]


DRIVER = """
import json
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_embed_faults import COMPUTE, Barrier, NotingSource, go, held_storage
from pipelines.compute.cluster import connect
from pipelines.backbones.clip import BackboneConfig
source = NotingSource.model_validate_json({source!r})
backbone = BackboneConfig.model_validate_json({backbone!r})
place = Path({place!r})
barrier = Barrier(**json.loads({barrier!r}))
with connect(COMPUTE):
    go(source, backbone, place, held_storage(place, barrier))
"""


@pytest.fixture
def barrier(tmp_path: Path) -> Barrier:
    return barrier_in(tmp_path)


@pytest.fixture
def driver(
    source: NotingSource, backbone: BackboneConfig, barrier: Barrier, tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a run in a process group of its own; all of them are gone at the end."""
    script = DRIVER.format(
        folder=str(Path(__file__).parent),
        source=source.model_dump_json(),
        backbone=backbone.model_dump_json(),
        place=str(tmp_path),
        barrier=json.dumps(asdict(barrier)),
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


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(
    undisturbed: dict[str, bytes],
    source: NotingSource,
    backbone: BackboneConfig,
    tmp_path: Path,
    barrier: Barrier,
    driver: Callable[[], subprocess.Popen[bytes]],
) -> None:
    process = driver()
    barrier.arrived(lambda: process.poll() is None)
    wait_until(lambda: num_finished(tmp_path) >= 3)  # by the worker that is not held
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: all(gone(pid) for pid, _ in notes(source)))
    barrier.open()
    folder = next((tmp_path / "storage").rglob("00*.parquet")).parent
    done = features.finished_shards(Storage.open(str(tmp_path / "storage")), folder.name)
    assert 3 <= len(done) < NUM_SHARDS
    before = len(notes(source))
    cache = go(source, backbone, tmp_path)
    assert shards(cache) == undisturbed
    assert len(notes(source)) - before == NUM_SHARDS - len(done)  # none of them twice


@pytest.mark.fault
@pytest.mark.slow
def test_two_runs_at_once_share_one_cache(
    undisturbed: dict[str, bytes],
    source: NotingSource,
    backbone: BackboneConfig,
    tmp_path: Path,
    barrier: Barrier,
    driver: Callable[[], subprocess.Popen[bytes]],
) -> None:
    other = driver()
    barrier.arrived(lambda: other.poll() is None)

    def both_at_it() -> bool:
        return bool({pid for pid, _ in notes(source)} - {*descendants(other.pid)})

    def go_on() -> None:
        wait_until(both_at_it)
        barrier.open()

    watcher = threading.Thread(target=go_on)
    watcher.start()
    cache = go(source, backbone, tmp_path)
    watcher.join()
    assert shards(cache) == undisturbed
    assert other.wait(timeout=PATIENCE) == 0
    assert shards(FeatureCache(cache.storage, cache.address)) == undisturbed
    keys = cache.keys().to_pylist()
    assert len(set(keys)) == 30
    assert cache.load(keys).shape == (30, 16)  # checks every shard against the manifest
