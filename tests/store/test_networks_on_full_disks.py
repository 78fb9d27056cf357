"""A disk that fills up while networks are trained: nothing kept is lost, and it goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.methods.base import TrainingConfig
from pipelines.store.errors import said_clearly
from pipelines.train import cache
from pipelines.train.stage import train
from tests.ray.commands import job_here
from tests.small_network import short, write_network
from tests.store.conftest import one_line
from tests.store.test_refused import fill
from tests.train.test_stage import NEW, small_data
from tests.train.toy import job

EPOCHS = 3
TRAINING = TrainingConfig(epochs=EPOCHS, batch_size=8, outlier_batch_size=4, warmup_epochs=0)
FIRST = replace(job("outlier_exposure", TRAINING), backbone=NEW)
SECOND = replace(FIRST, seed=1)


@dataclass(frozen=True)
class FullStorage(Storage):
    """A storage without room for a file from some moment on; what is begun of it is lost."""

    is_full: Callable[[str], bool] = field(default=lambda _: False)

    @contextmanager
    def writing(self, *parts: str, replace: bool = True) -> Iterator[Path]:
        with super().writing(*parts, replace=replace) as path:
            yield path
            if self.is_full(parts[-1]):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))


def network_files(storage: Storage, place: str) -> dict[str, bytes]:
    """A network and its record; the bytes of a checkpoint tell how often it was loaded."""
    names = (cache.WEIGHTS, "manifest.json")
    return {name: storage.read_bytes("cache", "networks", place, name) for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, list[str]]:
    """Both networks, trained undisturbed, and where they lie."""
    storage = Storage(str(tmp_path_factory.mktemp("whole")))
    jobs, compute = [FIRST, SECOND], ComputeConfig()
    return storage, train(jobs, small_data(), storage, compute=compute, mode="in_process")


@pytest.mark.parametrize(
    ("file", "from_epoch", "left"),
    [
        ("checkpoint.pt", 0, ()),
        ("checkpoint.pt", 1, ("checkpoint.pt",)),
        (cache.WEIGHTS, EPOCHS, ("checkpoint.pt",)),
        ("manifest.json", EPOCHS, ("checkpoint.pt", cache.WEIGHTS)),
    ],
)
def test_a_full_disk_loses_nothing_and_training_goes_on_from_the_checkpoint(
    whole: tuple[Storage, list[str]],
    tmp_path: Path,
    file: str,
    from_epoch: int,
    left: tuple[str, ...],
) -> None:
    undisturbed, places = whole
    seen: list[tuple[int, float]] = []

    def trained(storage: Storage) -> list[str]:
        return train(
            [FIRST, SECOND], small_data(), storage, compute=ComputeConfig(), mode="in_process",
            on_report=lambda job, report: seen.append((job.seed, report["epoch"])),
        )  # fmt: skip

    # The second network is under way, that many epochs of it are kept.
    begun = [(0, float(e)) for e in range(1, EPOCHS + 1)]
    begun += [(1, float(e)) for e in range(1, from_epoch + 1)]
    storage = FullStorage(
        str(tmp_path / "full"), is_full=lambda name: name == file and seen == begun
    )
    with pytest.raises(UserError) as caught, said_clearly(storage):
        trained(storage)
    (line,) = str(caught.value).splitlines()
    assert "No space left on device" in line
    assert line.endswith("make room there; the same command goes on from here")
    assert network_files(storage, places[0]) == network_files(undisturbed, places[0])
    assert set(storage.names("cache", "networks", places[1])) == set(left)

    seen.clear()
    assert trained(Storage(storage.root)) == places
    assert seen == [(1, float(e)) for e in range(from_epoch + 1, EPOCHS + 1)]
    for place in places:
        assert network_files(storage, place) == network_files(undisturbed, place)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_disk_that_fills_up_while_ray_trains_a_network(tmp_path: Path, small_disk: Path) -> None:
    storage = small_disk / "storage"
    words = [
        write_network(tmp_path), "methods=[network_energy]", *short("network_energy"),
        "scores=[energy]", "sweep=none", "seeds=1", "shots=4", "compute.max_failures=0",
        f"storage={storage}",
    ]  # fmt: skip
    done = job_here("train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (network,) = (storage / "cache" / "networks").iterdir()
    (record,) = storage.glob("runs/*/train.json")
    before, table = {p.name: p.read_bytes() for p in network.iterdir()}, record.read_bytes()
    record.unlink()
    for path in network.iterdir():
        path.unlink()
    filler = fill(small_disk)
    line = one_line(job_here("train", *words))
    assert "o space left on device" in line or "disk is full" in line
    assert line.endswith("make room there; the same command goes on from here")
    filler.unlink()
    again = job_here("train", *words)
    assert again.returncode == 0, again.stderr
    assert record.read_bytes() == table
    assert {p.name: p.read_bytes() for p in network.iterdir()} == before
    assert not list(storage.rglob(".*.tmp"))
