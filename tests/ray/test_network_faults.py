"""Networks and their decoded images when a worker or the driver is killed in the middle.

Each is held just before a file takes its name when it is killed (`tests.barrier`). Every end is
compared with that of an undisturbed run, byte by byte.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.methods.base import TrainingConfig
from pipelines.train import cache
from pipelines.train.data import NetworkJob
from pipelines.train.images import ImageTable, Making, make
from pipelines.train.stage import train
from tests.barrier import Barrier, gone, wait_until
from tests.ray.processes import descendants, kill
from tests.ray.test_embed_faults import NotingSource, notes
from tests.ray.test_train_images import PREPARATION
from tests.train.test_stage import NEW, small_data
from tests.train.toy import job

pytestmark = [pytest.mark.fault, pytest.mark.slow]

EPOCHS = 4
TRAINING = TrainingConfig(epochs=EPOCHS, batch_size=8, outlier_batch_size=4, warmup_epochs=0)
CHECKPOINT = "cache/networks/*/checkpoint.pt"
SHARD = "cache/images/*/0*.arrow"
ROOT = Path(__file__).parents[2]


def jobs() -> list[NetworkJob]:
    first = replace(job("outlier_exposure", TRAINING, average=0.5), backbone=NEW)
    return [first, replace(first, seed=1)]


def networks(storage: Storage, places: list[str]) -> list[bytes]:
    """The content of trained networks' files."""
    names = (cache.WEIGHTS, "manifest.json")
    return [storage.read_bytes("cache", "networks", p, name) for p in places for name in names]


def undisturbed(folder: Path) -> tuple[list[str], list[bytes]]:
    storage = Storage(str(folder / "undisturbed"))
    places = train(jobs(), small_data(), storage, compute=ComputeConfig(), mode="in_process")
    return places, networks(storage, places)


@contextmanager
def killed_once(barrier: Barrier) -> Iterator[list[int]]:
    """Kill the process that is held, once, and open the barrier; its id when it is dead."""
    killed: list[int] = []

    def kill_it() -> None:
        killed.append(barrier.arrived())
        kill(killed[0])
        barrier.open()

    killer = threading.Thread(target=kill_it)
    killer.start()
    yield killed
    killer.join()


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_ends_with_the_undisturbed_weights(tmp_path: Path) -> None:
    places, expected = undisturbed(tmp_path)
    # The second network's second epoch is trained and its state not yet kept.
    barrier = Barrier.new(tmp_path / "barrier", held=CHECKPOINT, after=CHECKPOINT, more=1)
    storage, seen = barrier.storage(str(tmp_path / "killed")), []
    with killed_once(barrier) as killed:
        again = train(
            jobs(), small_data(), storage, compute=ComputeConfig(),
            on_report=lambda job, report: seen.append((job.seed, report["epoch"])),
        )  # fmt: skip
    assert len(killed) == 1
    assert again == places
    assert networks(storage, places) == expected
    # It went on in the middle: what was kept was not trained again.
    assert len(seen) == len(set(seen))
    assert set(seen) >= {(1, float(epoch)) for epoch in range(2, EPOCHS + 1)}


DRIVER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import ray
from pipelines.compute.cluster import ComputeConfig
from tests.barrier import Barrier
from tests.ray import test_network_faults as tests
storage = Barrier(**json.loads(sys.argv[2])).storage(sys.argv[1])
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
"""
TRAINS = "tests.train(tests.jobs(), tests.small_data(), storage, compute=ComputeConfig())"
DECODES = "tests.decode(tests.NotingSource.model_validate_json(sys.argv[3]), storage)"


def killed_at(barrier: Barrier, root: str, work: str, *words: str, until: int = 0) -> None:
    """Start a driver that does `work`, and kill it and all below it once a process is held.

    Args:
        barrier: where it is held.
        root: of its storage.
        work: the last line of its program.
        words: its further arguments.
        until: wait for that many shards of images too.
    """
    command = [sys.executable, "-c", DRIVER + work, root, json.dumps(asdict(barrier)), *words]
    driver = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    below: list[int] = []
    try:
        barrier.arrived(lambda: driver.poll() is None)
        wait_until(lambda: len(list(Path(root).glob(SHARD))) >= until)
        below = descendants(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    finally:
        for pid in below or descendants(driver.pid):
            kill(pid)
        driver.kill()
        driver.wait()
    wait_until(lambda: all(gone(pid) for pid in below))
    barrier.open()


def test_a_killed_driver_started_again_trains_only_what_was_not_kept(tmp_path: Path) -> None:
    places, expected = undisturbed(tmp_path)
    barrier = Barrier.new(tmp_path / "barrier", held=CHECKPOINT, after=CHECKPOINT, more=1)
    storage = Storage(str(tmp_path / "killed"))
    killed_at(barrier, storage.root, TRAINS)
    assert [cache.is_trained(storage, place) for place in places] == [True, False]
    finished = storage.local("cache", "networks", places[0], cache.WEIGHTS)
    written, seen = finished.stat().st_mtime_ns, []
    again = train(
        jobs(), small_data(), storage, compute=ComputeConfig(), mode="in_process",
        on_report=lambda job, report: seen.append((job.seed, report["epoch"])),
    )  # fmt: skip
    assert again == places
    assert networks(storage, places) == expected
    assert seen == [(1, float(epoch)) for epoch in range(2, EPOCHS + 1)]
    assert finished.stat().st_mtime_ns == written


def decode(source: NotingSource, storage: Storage, *, with_ray: bool = True) -> ImageTable:
    making = Making(shard_rows=3, with_ray=with_ray, at_once=2)
    return make(source, storage, name="mine", keys=None, preparation=PREPARATION, making=making)


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> NotingSource:
    return NotingSource(root=str(pictures), notes=str(tmp_path / "notes"))


def files(table: ImageTable) -> dict[str, bytes]:
    """What was written; unfinished files are swept at the next start of a job (tests/store)."""
    paths = table.storage.local(*table.entry.folder).iterdir()
    return {path.name: path.read_bytes() for path in paths if not path.name.startswith(".")}


def whole(pictures: Path, folder: Path) -> dict[str, bytes]:
    """The files of images that were decoded without a fault."""
    source = NotingSource(root=str(pictures), notes=str(folder / "undisturbed-notes"))
    return files(decode(source, Storage(str(folder / "undisturbed")), with_ray=False))


def test_a_driver_killed_while_images_are_decoded_goes_on(
    pictures: Path, source: NotingSource, tmp_path: Path
) -> None:
    # A later shard than the first waits; the other task goes on beside it.
    barrier = Barrier.new(tmp_path / "barrier", held=SHARD, after=SHARD)
    storage = Storage(str(tmp_path / "killed"))
    killed_at(barrier, storage.root, DECODES, source.model_dump_json(), until=3)
    (folder,) = storage.local("cache", "images").iterdir()
    assert not (folder / "manifest.json").exists()
    kept = {int(path.stem) for path in folder.glob("0*.json")}
    assert 1 <= len(kept) < 10
    before = len(notes(source))
    table = decode(source, storage, with_ray=False)
    assert files(table) == whole(pictures, tmp_path)
    keys = sorted(source.index()["key"].to_pylist())
    again = [key for _, key in notes(source)[before:]]
    assert again == [keys[3 * shard] for shard in range(10) if shard not in kept]


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_costs_only_the_images_that_it_was_decoding(
    pictures: Path, source: NotingSource, tmp_path: Path
) -> None:
    barrier = Barrier.new(tmp_path / "barrier", held=SHARD, after=SHARD)
    storage = barrier.storage(str(tmp_path / "killed"))
    with killed_once(barrier) as killed:
        table = decode(source, storage)
    assert files(table) == whole(pictures, tmp_path)
    lost = [key for pid, key in notes(source) if pid == killed[0]]
    begun = [key for _, key in notes(source)]
    assert len(set(begun)) == 10
    assert {key for key in begun if begun.count(key) > 1} <= set(lost)
