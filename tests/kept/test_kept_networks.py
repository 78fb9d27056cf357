"""Every kind of file that training networks leaves, damaged in four ways.

As in `tests.kept.test_every_kept_file`: the same command again gives the same networks, byte by
byte; what is damaged is told, removed and made again, never used. In `make test` one file of each
kind is damaged in one way, all at once; in the slow matrix each alone in all of them. Nothing here
needs Ray: training is in this process.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.config import load
from pipelines.pipeline import run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig
from tests.kept.test_every_kept_file import DAMAGES, address, another, by_kind, kind_of
from tests.small_network import short, write_network

# What the stage reads again: damaged, it is made again.
CACHE = {
    "network": r"cache/networks/\w+/weights\.safetensors",
    "network's manifest": r"cache/networks/\w+/manifest\.json",
    "network's checkpoint": r"cache/networks/\w+/checkpoint\.pt",
    "images": r"cache/images/\w+/\d+\.arrow",
    "images' receipt": r"cache/images/\w+/\d+\.json",
    "images' manifest": r"cache/images/\w+/manifest\.json",
    "unread images": r"cache/images/\w+/rejected\.parquet",
    "outlier prior": r"cache/priors/\w+\.json",
}
RUN = {
    "record of the stage": r"runs/\w+/train\.json",
    "stamp": r"runs/\w+/stamps/train\.json",
    "configuration": r"runs/\w+/config\.yaml",
    "MLflow run": r"runs/\w+/mlflow\.json",
}
# MLflow's own, and empty locks: see `tests.kept.test_every_kept_file`.
OTHERS = {"database": r"mlflow\.db", "lock": r"locks/[\w-]+\.lock"}
# Times differ from run to run, and a checkpoint's bytes tell how often it was loaded.
ANEW = ("stamp", "MLflow run", "network's checkpoint")


@dataclass(frozen=True)
class Trained:
    """A finished stage of networks, and a copy of its files to put back."""

    root: Path
    copy: Path
    words: tuple[str, ...]

    def again(self, last: str = "train") -> None:
        run(load(PipelineConfig, "pipeline", self.words), Quiet(), last=last)

    def restore(self) -> None:
        for name in ("cache", "runs"):
            shutil.rmtree(self.root / name)
            shutil.copytree(self.copy / name, self.root / name)

    def differing(self) -> list[str]:
        """The files that are not there as they were."""
        found = []
        for file in sorted(path for path in self.copy.rglob("*") if path.is_file()):
            name = file.relative_to(self.copy).as_posix()
            if kind_of(name, CACHE | RUN) in ANEW:
                continue
            now = self.root / name
            if not now.is_file() or now.read_bytes() != file.read_bytes():
                found.append(name)
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("networks")
    root, copy = folder / "storage", folder / "copy" / "storage"
    words = (
        write_network(folder), "methods=[classifier,network_balanced]", "scores=[energy]",
        *short("network_balanced"), "sweep=none", "seeds=1", "shots=2", "training=in_process",
        f"storage={root}",
    )  # fmt: skip
    done = Trained(root, copy, words)
    done.again()
    for name in ("cache", "runs"):
        shutil.copytree(root / name, copy / name)
    return done


@pytest.fixture
def whole(trained: Trained) -> Iterator[Trained]:
    yield trained
    trained.restore()


def test_no_file_is_of_an_unknown_kind(trained: Trained) -> None:
    """Add the kind of a new file above, where it is damaged then."""
    found = by_kind(trained.root, CACHE | RUN | OTHERS)
    known = {file for files in found.values() for file in files}
    assert [f for f in trained.root.rglob("*") if f.is_file() and f not in known] == []


def hurt(whole: Trained, paths: Sequence[Path], damages: Sequence[str]) -> None:
    """Damage these files; what hides them goes, as if the stage had been stopped."""
    spares = []
    for number, path in enumerate(paths):
        spare = whole.copy.parent / f"spare{number}"
        spare.write_bytes(another(path, list(paths)).read_bytes())
        spares.append(spare)
    shutil.rmtree(whole.root / "runs")
    for path, spare, damage in zip(paths, spares, itertools.cycle(damages)):
        if path.name == "checkpoint.pt":  # of a finished network it is never read
            path.with_name("manifest.json").unlink(missing_ok=True)
        DAMAGES[damage](path, spare)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "pipelines.data.kept"]


def test_one_file_of_each_kind_is_made_again(
    whole: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    files = by_kind(whole.root, {k: p for k, p in CACHE.items() if "checkpoint" not in k})
    chosen: list[Path] = []
    for of in files.values():  # each at an address of its own where there are enough
        used = [address(path) for path in chosen]
        chosen.append(min(of, key=lambda path: used.count(address(path))))
    hurt(whole, chosen, ("flip", "truncate", "swap"))
    with caplog.at_level(logging.WARNING):
        whole.again()
    assert whole.differing() == []
    for path in chosen:
        assert any(address(path) in line for line in told(caplog)), path


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", CACHE)
def test_what_the_stage_reads_again_is_made_again(
    whole: Trained, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = by_kind(whole.root, CACHE)[kind]
    hurt(whole, [files[len(files) // 2]], (damage,))
    with caplog.at_level(logging.WARNING):
        whole.again()
    assert whole.differing() == []
    lines = set(told(caplog))  # of images both their table and the shard's receipt tell
    assert len(lines) <= 2
    if damage != "delete":
        assert any("is removed and made again" in line for line in lines), lines


def test_one_file_of_each_kind_of_a_finished_stage_is_made_again(whole: Trained) -> None:
    paths = [path for files in by_kind(whole.root, RUN).values() for path in files]
    for path, damage in zip(paths, itertools.cycle(DAMAGES.values())):
        damage(path, another(path, paths))
    whole.again()
    assert whole.differing() == []
    assert all(path.is_file() for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", RUN)
def test_a_finished_stage_is_found_as_it_was_or_done_again(
    whole: Trained, kind: str, damage: str
) -> None:
    (path,) = by_kind(whole.root, RUN)[kind]
    DAMAGES[damage](path, another(path, [path]))
    whole.again()
    assert whole.differing() == []
    assert kind == "MLflow run" or path.is_file()  # written when something is trained
