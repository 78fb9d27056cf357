"""Every kind of file of a finished run and of a registered model, damaged in four ways.

The same command again gives the same table, or one line that says what to do: never another table,
never a traceback. A file of an unknown kind fails here, so a new kind is tested by existing.

In `make test` one file of each kind is damaged in one way, all at once; in the slow matrix each
alone in all of them, and every other file in one. A sweep's workers, which take seconds to start,
meet each kind damaged in one way.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.config import UserError, load
from pipelines.data.digits import DigitsSource
from pipelines.data.storage import Storage
from pipelines.evaluate.metrics import MetricRow
from pipelines.pipeline import run
from pipelines.predict.stage import PredictConfig, load_detector
from pipelines.predict.stage import run as predict
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig
from tests.conftest import SmokeRun

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORDS = (
    "preset=test",
    "training=in_process",
    "methods=[zero_shot,balanced_energy]",
    "methods.balanced_energy.training.epochs=1",
    "scores=[mcm,knn,neg_label]",
    "sweep.posthoc.budget=2",
)

# What a stage reads again: damaged, it is made again.
CACHE = {
    "backbone": r"cache/backbones/[^/]+/model\.(json|safetensors)",
    "backbone's manifest": r"cache/backbones/[^/]+/manifest\.json",
    "shard": r"cache/features/\w+/\d+\.parquet",
    "features' manifest": r"cache/features/\w+/manifest\.json",
    "rejected images": r"cache/features/\w+/rejected\.parquet",
    "text features": r"cache/text/\w+\.parquet",
    "statistics": r"cache/statistics/\w+/statistics\.safetensors",
    "statistics' manifest": r"cache/statistics/\w+/manifest\.json",
    "outlier prior": r"cache/priors/\w+\.json",
    "trial": r"cache/trials/\w+\.json",
    "head": r"cache/heads/\w+/(best|last)/head\.(json|safetensors)",
    "head's manifest": r"cache/heads/\w+/manifest\.json",
    "checkpoint": r"cache/heads/\w+/checkpoint\.pt",
    "fitted record": r"cache/fitted/\w+/record\.safetensors",
    "fitted manifest": r"cache/fitted/\w+/manifest\.json",
    "score part": r"cache/scores/\w+/\w+-\d+\.parquet",
    "scores' manifest": r"cache/scores/\w+/manifest\.json",
}
RUN = {
    "record of a stage": r"runs/\w+/(embed|sweep|finetune|score|metrics|register)\.json",
    "stamp": r"runs/\w+/stamps/\w+\.json",
    "configuration": r"runs/\w+/config\.yaml",
    "MLflow run": r"runs/\w+/mlflow\.json",
    "training images": r"runs/\w+/train\.parquet",
    "surfaces": r"runs/\w+/surfaces\.parquet",
    "chosen setting": r"runs/\w+/best/\w+\.yaml",
    "evidence": r"runs/\w+/sweep/evidence\.json",
    "picture": r"runs/\w+/sweep/[\w-]+\.png",
    "report": r"runs/\w+/report\.html",
}
MODEL = {
    "detector": r"detector\.json",
    "detector's head": r"head\.(json|safetensors)",
    "detector's backbone": r"backbone\.(json|safetensors)",
    "detector's record": r"score-[\w+]+\.safetensors",
    "detector's known scores": r"known-scores\.safetensors",
    "detector's training images": r"training-examples\.parquet",
}
# A backbone takes seconds to be trained again; the slow matrix has it.
QUICK = tuple(kind for kind in CACHE if kind not in ("backbone", "backbone's manifest"))
# MLflow's own: its database (tests/store/test_found.py), its copies of what is in runs/, and what
# surrounds the detector of a model, which `predict` does not read. Locks are empty.
MLFLOW = {
    "database": r"mlflow\.db",
    "lock": r"locks/[\w-]+\.lock",
    "copy": r"artifacts/\w+/artifacts/.+",
    "model": r"artifacts/models/m-\w+/artifacts/(?!artifacts/detector/).+",
    "model's detector": r"artifacts/models/m-\w+/artifacts/artifacts/detector/[^/]+",
}


def flip(path: Path, other: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x04]) + content[middle + 1 :])


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    damage.__name__: damage for damage in (flip, truncate, delete, swap)
}


def kind_of(path: str, kinds: dict[str, str]) -> str | None:
    found = [kind for kind, pattern in kinds.items() if re.fullmatch(pattern, path)]
    assert len(found) <= 1, f"{path}: {found}"
    return found[0] if found else None


def by_kind(root: Path, kinds: dict[str, str]) -> dict[str, list[Path]]:
    """The files of each kind; no kind is without one."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sorted_files: dict[str, list[Path]] = {kind: [] for kind in kinds}
    for file in files:
        kind = kind_of(file.relative_to(root).as_posix(), kinds)
        if kind is not None:
            sorted_files[kind].append(file)
    assert all(sorted_files.values()), [kind for kind, of in sorted_files.items() if not of]
    return sorted_files


def another(path: Path, same: list[Path]) -> Path:
    """Find a file with other bytes: one of the kind, else of the same format, else any."""
    root = path.parents[len(path.parts) - 1 - path.parts.index("storage") - 1]
    alike = sorted((f.suffix != path.suffix, f) for f in same)
    others = sorted((f.suffix != path.suffix, f) for f in root.rglob("*") if f.is_file())
    content = path.read_bytes()
    return next(file for _, file in [*alike, *others] if file.read_bytes() != content)


@dataclass(frozen=True)
class Finished:
    """A finished run, a copy of its files to put back, and its table."""

    root: Path
    copy: Path
    rows: tuple[MetricRow, ...]

    def restore(self) -> None:
        for name in ("cache", "runs"):
            shutil.rmtree(self.root / name)
            shutil.copytree(self.copy / name, self.root / name)

    def again(self, last: str | None = None) -> Run:
        words = [*WORDS, f"storage={self.root}"]
        return run(load(PipelineConfig, "pipeline", words), Quiet(), last=last)

    def forget(self, *paths: Path, trials: bool = True) -> None:
        """What makes the next command read the files: the stages have not run.

        With `trials` the sweep, whose workers read them too, has not either.
        """
        shutil.rmtree(self.root / "runs")
        damaged = {address(path) for path in paths}
        for path in paths:
            if kind_of(path.relative_to(self.root).as_posix(), CACHE) == "checkpoint":
                path.with_name("manifest.json").unlink()
        # What is found where it was made of a file keeps the file from being read.
        for made, sources in {
            "trials": ("features", "text", "fitted", "statistics", "priors") if trials else (),
            "heads": ("priors",),
            "fitted": ("text", "statistics"),
            "scores": ("features", "heads", "fitted"),
        }.items():
            if {name.partition("/")[0] for name in damaged} & set(sources):
                for entry in (self.root / "cache" / made).iterdir():
                    if address(entry) not in damaged:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture(scope="module")
def finished(smoke_run: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("kept")
    root = folder / "storage"
    smoke_run.copy_cache(root, "backbones", "features")
    done = Finished(root, folder / "copy" / "storage", ())
    rows = done.again().metrics.rows
    for name in ("cache", "runs"):
        shutil.copytree(root / name, done.copy / name)
    return Finished(root, done.copy, rows)


@pytest.fixture
def whole(finished: Finished) -> Iterator[Finished]:
    yield finished
    finished.restore()


def is_as_it_was(finished: Finished, last: str | None = None) -> bool:
    """Whether the command mends what is damaged and gives the same table."""
    return finished.again(last).metrics.rows == finished.rows


def test_no_file_is_of_an_unknown_kind(finished: Finished) -> None:
    """Add the kind of a new file above, where it is damaged then."""
    every = CACHE | RUN | MLFLOW
    found = by_kind(finished.root, every)
    known = {file for files in found.values() for file in files}
    unknown = [f for f in finished.root.rglob("*") if f.is_file() and f not in known]
    assert unknown == []


def one_of_each(whole: Finished, kinds: tuple[str, ...]) -> list[Path]:
    """A file of each kind, each at an address of its own where there are enough."""
    files, chosen = by_kind(whole.root, CACHE), list[Path]()
    for kind in sorted(kinds, key=lambda kind: len(files[kind])):  # the rarest choose first
        used = [address(path) for path in chosen]
        chosen.append(min(files[kind], key=lambda path: used.count(address(path))))
    return chosen


def address(path: Path) -> str:
    """What names a file of the cache: its kind's folder, and the folder or file below it."""
    parts = path.parts
    start = parts.index("cache") + 1
    return "/".join(parts[start : start + 2])


def test_one_file_of_each_kind_is_made_again(
    whole: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    paths = one_of_each(whole, QUICK)
    spares = [another(path, paths) for path in paths]
    contents = [spare.read_bytes() for spare in spares]
    whole.forget(*paths)
    damages = itertools.cycle((flip, truncate, swap))
    for number, (path, content, damage) in enumerate(zip(paths, contents, damages, strict=False)):
        spare = whole.copy.parent / f"spare{number}"
        spare.write_bytes(content)
        damage(path, spare)
    with caplog.at_level(logging.WARNING):
        assert is_as_it_was(whole, last="evaluate")
    told = [r.getMessage() for r in caplog.records if r.name == "pipelines.data.kept"]
    for path in paths:
        assert path.is_file()
        assert any(address(path) in line for line in told), (path, told)


def test_one_file_of_each_kind_of_a_finished_run_is_made_again(whole: Finished) -> None:
    paths = [files[len(files) // 2] for files in by_kind(whole.root, RUN).values()]
    others = [another(path, paths) for path in paths]
    for path, other, damage in zip(paths, others, itertools.cycle(DAMAGES.values())):
        damage(path, other)
    assert is_as_it_was(whole)
    assert all(path.is_file() for path in paths)


def cases(kinds: dict[str, str]) -> list[tuple[str, str]]:
    """Every kind in every way."""
    return list(itertools.product(kinds, DAMAGES))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "damage"), cases(CACHE))
def test_what_a_stage_reads_again_is_made_again(
    whole: Finished, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = by_kind(whole.root, CACHE)[kind]
    path = files[len(files) // 2]
    other = another(path, files).read_bytes()
    spare = whole.copy.parent / f"spare{path.suffix}"
    spare.write_bytes(other)
    whole.forget(path, trials=damage == "flip")
    DAMAGES[damage](path, spare)
    with caplog.at_level(logging.WARNING):
        assert is_as_it_was(whole, last="evaluate")
    told = [r.getMessage() for r in caplog.records if r.name == "pipelines.data.kept"]
    assert len(told) == len(set(told)) <= 2
    if damage != "delete":
        assert any("is removed and made again" in line for line in told), told
    assert by_kind(whole.root, {kind: CACHE[kind]})[kind]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "damage"), cases(RUN))
def test_a_finished_run_is_found_as_it_was_or_done_again(
    whole: Finished, kind: str, damage: str
) -> None:
    files = by_kind(whole.root, RUN)[kind]
    path = files[len(files) // 2]
    before, other = path.read_bytes(), another(path, files)
    DAMAGES[damage](path, other)
    assert is_as_it_was(whole, last=None if path.name == "register.json" else "evaluate")
    if kind not in ("stamp", "MLflow run"):  # times differ
        assert path.is_file()
        assert kind in ("record of a stage", "picture", "report") or path.read_bytes() == before


@pytest.mark.slow
def test_every_file_of_a_finished_run(finished: Finished) -> None:
    """One after the other, each in one way, each way in turn."""
    files = by_kind(finished.root, CACHE | RUN)
    every = [(path, another(path, same)) for same in files.values() for path in same]
    for (path, other), damage in zip(every, itertools.cycle(DAMAGES.values())):
        damage(path, other)
        assert is_as_it_was(finished), path
        finished.restore()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_registered_model_judges_as_it_did_or_says_how_to_restore_it(
    finished: Finished, tmp_path: Path, damage: str
) -> None:
    (model,) = finished.root.glob("artifacts/models/*/artifacts/artifacts/detector")
    folder = tmp_path / "storage" / "detector"
    shutil.copytree(model, folder)
    images = DigitsSource().read(["digits/0000/plain", "digits/0001/noisy"])
    expected = load_detector(str(folder), Storage(str(tmp_path))).judge_images(images)
    kinds = by_kind(folder, MODEL)
    assert {f for files in kinds.values() for f in files} == set(folder.iterdir())
    for files in kinds.values():
        for path in files:
            other = tmp_path / "storage" / f"other{path.suffix}"
            other.write_bytes(another(path, files).read_bytes())
            DAMAGES[damage](path, other)
            with pytest.raises(UserError) as error:
                load_detector(str(folder), Storage(str(tmp_path)))
            assert len(str(error.value).splitlines()) == 1
            words = "no detector there" if path.name == "detector.json" else "jobs.register"
            assert words in str(error.value) or "jobs.register" in str(error.value)
            shutil.copyfile(model / path.name, path)
    again = load_detector(str(folder), Storage(str(tmp_path))).judge_images(images)
    assert again.equals(expected)


def test_a_threshold_that_was_edited_judges_nothing(finished: Finished, tmp_path: Path) -> None:
    """Of a damaged model that MLflow finds: a verdict went from OOD to ID without a word."""
    (model,) = finished.root.glob("artifacts/models/*/artifacts/artifacts/detector")
    image = tmp_path / "image.png"
    (content,) = DigitsSource().read(["digits/0000/plain"])
    assert isinstance(content, bytes)
    image.write_bytes(content)
    config = PredictConfig(source=str(image), storage=str(finished.root))
    (verdict,) = predict(config)
    path = model / "detector.json"
    before = path.read_text()
    edited = re.sub(r'"threshold": [-\d.e]+', '"threshold": 9.01', before, count=1)
    assert edited != before
    path.write_text(edited)
    try:
        with pytest.raises(UserError, match=r"judges nothing.*python -m jobs\.register"):
            predict(config)
    finally:
        path.write_text(before)
    assert list(predict(config)) == [verdict]
