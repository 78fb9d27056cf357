"""The main job in a process of its own: its output, a second run, and being killed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

from pipelines.config import group_names
from pipelines.data.digits import DigitsSource
from pipelines.data.storage import Storage
from pipelines.run import RECORDS
from tests.barrier import Barrier
from tests.conftest import SECRET, SmokeRun
from tests.ray.commands import job, job_here, job_killed_at

STAGES = ("embed", "sweep", "finetune", "score", "evaluate", "register")
METHODS = ("zero_shot", "coop", "ebm")
SCORES = ("mcm", "max_logit", "delta_energy")
Finished = tuple[Path, subprocess.CompletedProcess[str]]


def new_storage(folder: Path, *caches: Path) -> Path:
    """A storage that holds these folders of another one's cache."""
    storage = folder / "storage"
    for cache in caches:
        shutil.copytree(cache, storage / "cache" / cache.name)
    return storage


def run_folder(storage: Path) -> Path:
    (folder,) = (storage / "runs").iterdir()
    return folder


def metrics(storage: Path) -> bytes:
    return (run_folder(storage) / "metrics.json").read_bytes()


def pipeline(storage: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = job("pipeline", "preset=test", f"storage={storage}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def table_of(folder: Path, method: str, variant: str = "chosen") -> str:
    """The address of the scores of a method's first head."""
    return address_in(folder / "score.json", method, variant)


def head_of(folder: Path, method: str, variant: str = "chosen") -> str:
    """The address of a method's first head."""
    return address_in(folder / "finetune.json", method, variant)


def address_in(record: Path, method: str, variant: str) -> str:
    key = {"method": method, "seed": 0, "variant": variant}
    (found,) = (h["address"] for h in json.loads(record.read_text())["heads"] if h["key"] == key)
    return str(found)


def ending(output: str) -> str:
    """What is printed after the stages' lines."""
    return output.split("\n\n", 1)[1]


@pytest.fixture(scope="module")
def backbones(mini_storage: Storage) -> Path:
    return mini_storage.local("cache", "backbones")


@pytest.fixture(scope="module")
def first(smoke_run: SmokeRun) -> Finished:
    """An undisturbed run: its storage and what it printed."""
    return smoke_run.storage, smoke_run.done


def test_it_shows_its_stages_in_order_and_says_what_to_do_next(first: Finished) -> None:
    storage, done = first
    shown = re.findall(r"^\[(\d)/6\] (\w+) +done in [\d.]+ s", done.stdout, re.MULTILINE)
    assert shown == [(str(n), stage) for n, stage in enumerate(STAGES, start=1)]
    assert "Traceback" not in done.stderr
    words = ending(done.stdout)
    for name in ("ID ACC", "OOD ACC", "AUROC", "FPR", "champion"):
        assert name in words
    for line in (
        f"report     {run_folder(storage)}/report.html",
        f"mlflow ui --backend-store-uri sqlite:///{storage}/mlflow.db",
        f"python -m jobs.predict source=PATH storage={storage}",
    ):
        assert line in words


def test_it_leaves_the_evidence(first: Finished) -> None:
    storage, _ = first
    folder = run_folder(storage)
    for stage in STAGES:
        assert json.loads((folder / RECORDS.get(stage, f"{stage}.json")).read_text())
    found = json.loads(metrics(storage))
    assert [(r["method"], r["score"]) for r in found["rows"]] == [
        (m, s) for m in METHODS for s in SCORES
    ]
    assert {r["label"] for r in found["rows"] if r["label"]} == {
        "Zhu 2025: CoOp + MCM",
        "Zhu 2025: EBM + DeltaEnergy",
    }
    # zero_shot trains nothing; the two others train two epochs, of which one is kept.
    trained = {t["key"]["method"]: t for t in found["trainings"]}
    assert set(trained) == {"coop", "ebm"}
    assert all(t["epochs"] == 2 and t["best_epoch"] in (1, 2) for t in trained.values())
    assert trained["ebm"]["figures"]["bound_gradient_ratio"] > 0
    for method in METHODS:
        parts = (storage / "cache" / "scores" / table_of(folder, method)).glob("*.parquet")
        rows = sum(pq.read_metadata(part).num_rows for part in parts)
        sizes = found["facts"]["sets"]
        scored = [n for n in sizes if n.split("/")[0] not in ("train", "outliers")]
        assert rows == sum(sizes[name] for name in scored)
    page = (folder / "report.html").read_text()
    assert "<html" in page
    assert "zero_shot: no map, the run keeps no local features" in page
    assert not re.search(r"""(?:src|href)=["']https?://[^"']+\.(?:js|css|png|svg)""", page)


def test_the_registered_model_judges_an_image(first: Finished, tmp_path: Path) -> None:
    storage, _ = first
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    version = client.get_model_version_by_alias("energy-ood", "champion")
    registered = json.loads((run_folder(storage) / "register.json").read_text())
    assert str(registered["model_version"]) == str(version.version)
    (image,) = DigitsSource().read(["digits/0003/plain"])
    assert isinstance(image, bytes)
    (tmp_path / "digit.png").write_bytes(image)
    done = job_here("predict", f"source={tmp_path}/digit.png", f"storage={storage}")
    assert done.returncode == 0, done.stderr
    threshold = json.loads(metrics(storage))
    row = next(
        r
        for r in threshold["rows"]
        if (r["method"], r["score"]) == (registered["method"], registered["score"])
    )
    number = r"([-\d.e+]+)"
    pattern = (
        rf"digit\.png: (\w+), score {number}, threshold {number}, p-value {number}, (OOD|ID)\n$"
    )
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    assert float(found[3]) == pytest.approx(row["threshold"]["value"], rel=1e-5)
    assert (float(found[2]) < float(found[3])) == (found[5] == "OOD")
    # The smallest p-value is 1 / (n + 1); an accepted image has one above 1 - target_tpr.
    assert float(found[4]) > 0.99 / (row["threshold"]["num_images"] + 1)
    assert found[5] == "OOD" or float(found[4]) > 0.05


def test_no_secret_of_the_environment_is_written_or_told(first: Finished) -> None:
    """Whole run, every stage and Ray's workers; tests/secrets plants one in every address."""
    storage, done = first
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in storage.rglob("*") if path.is_file()]
    assert {"mlflow.db", "report.html", "config.yaml"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_run_finds_everything_and_prints_the_same(first: Finished) -> None:
    storage, done = first
    before = {p: p.stat().st_mtime_ns for p in (storage / "cache").rglob("*") if p.is_file()}
    again = job_here("pipeline", "preset=test", f"storage={storage}")
    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()[: len(STAGES)]
    assert lines == [f"{stage:<15} found, nothing to do" for stage in STAGES]
    assert ending(again.stdout) == ending(done.stdout)
    assert {p: p.stat().st_mtime_ns for p in before} == before


# Where a stage is killed: a file of its first output is there, the next one waits just before it
# takes its name.
MIDDLE = {
    "embed": ("cache/features/*/0*.parquet", "cache/features/*/0*.parquet"),
    "sweep": ("cache/trials/*.json", "cache/trials/*.json"),
    "finetune": ("cache/heads/*/checkpoint.pt", "cache/heads/*/checkpoint.pt"),
    "score": ("cache/scores/*/*.parquet", "cache/scores/*/*.parquet"),
    "evaluate": ("runs/*/metrics.json", "runs/*/score.json"),
    "register": ("runs/*/register.json", "runs/*/metrics.json"),
}


def killed_in(stage: str, storage: Path, *words: str) -> None:
    """Start the pipeline and kill it in the middle of a stage."""
    held, after = MIDDLE[stage]
    barrier = Barrier.new(storage.parent / f"barrier_{stage}", held=held, after=after)
    job_killed_at(barrier, "pipeline", "preset=test", f"storage={storage}", *words)
    done = {s for s in STAGES if (run_folder(storage) / RECORDS.get(s, f"{s}.json")).exists()}
    assert done == set(STAGES[: STAGES.index(stage)]), stage


@pytest.mark.fault
@pytest.mark.slow
def test_killed_while_training_it_goes_on_to_the_same_numbers(
    first: Finished, backbones: Path, tmp_path: Path
) -> None:
    cache = first[0] / "cache"
    storage = new_storage(tmp_path, backbones, cache / "features", cache / "trials")
    # Without Ray Train, which the test below has; the heads are the same bytes.
    killed_in("finetune", storage, "training=in_process")
    pipeline(storage, "training=in_process")
    assert metrics(storage) == metrics(first[0])


def test_the_chosen_settings_stand_beside_the_default_ones(first: Finished) -> None:
    storage, _ = first
    folder = run_folder(storage)
    found = json.loads(metrics(storage))
    compared = {(row["method"], row["score"]) for row in found["best_against_default"]}
    # Only temperatures and c are searched: the heads are the same, max_logit has nothing.
    assert compared <= {(m, s) for m in METHODS for s in ("mcm", "delta_energy")}
    assert compared
    for method in {method for method, _ in compared}:
        assert table_of(folder, method, "default") != table_of(folder, method)
        assert head_of(folder, method, "default") == head_of(folder, method)


@pytest.mark.slow
def test_the_winning_yaml_gives_the_same_numbers_again(backbones: Path, tmp_path: Path) -> None:
    words = ("sweep=default", "sweep.posthoc.budget=6", "seeds=2")
    space = "sweep.space={ebm: {training.lr: [0.002, 0.05], weight: [0.5, 3.0]}}"
    swept, again = (new_storage(tmp_path / name, backbones) for name in ("swept", "again"))
    pipeline(swept, *words, space, "methods=[ebm]")
    folder = run_folder(swept)
    chosen = json.loads((folder / "sweep.json").read_text())["methods"]["ebm"]
    found = json.loads(metrics(swept))
    assert {"training.lr", "weight"} == set(chosen["chosen"])
    heads = json.loads((folder / "finetune.json").read_text())["heads"]
    default = [h["address"] for h in heads if h["key"]["variant"] == "default"]
    assert len(default) == 1  # of the first seed only
    assert default[0] not in {h["address"] for h in heads if h["key"]["variant"] == "chosen"}
    pipeline(again, f"methods=@{folder}/best/ebm.yaml", "sweep=none", "seeds=2")
    repeated = json.loads(metrics(again))
    assert repeated["rows"] == found["rows"]
    assert repeated["comparisons"] == found["comparisons"]
    assert repeated["best_against_default"] == []
    assert [row["params"] for row in repeated["rows"]] == [
        chosen["scores"][row["score"]] for row in repeated["rows"]
    ]


@pytest.mark.fault
@pytest.mark.slow
def test_killed_in_every_stage_it_goes_on_to_the_same_numbers(
    first: Finished, backbones: Path, tmp_path: Path
) -> None:
    """One run that is started seven times: each start but the last ends in the next stage."""
    storage = new_storage(tmp_path, backbones)
    for stage in STAGES:
        killed_in(stage, storage)
    pipeline(storage)
    assert metrics(storage) == metrics(first[0])
    tables = [s / "cache" / "scores" / table_of(run_folder(s), "ebm") for s in (storage, first[0])]
    parts = [{p.name: p.read_bytes() for p in table.glob("*.parquet")} for table in tables]
    assert parts[0] == parts[1]
    assert parts[0]


@pytest.mark.fault
@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_keeps_its_trials_and_has_the_same_winner(
    first: Finished, backbones: Path, tmp_path: Path
) -> None:
    words = (
        "preset=test",
        "methods=[coop]",
        "sweep.space={coop: {training.lr: [0.001, 0.005, 0.02, 0.05, 0.1, 0.2]}}",
        "methods.coop.training.epochs=20",
    )
    features = first[0] / "cache" / "features"
    whole, killed = (
        new_storage(tmp_path / name, backbones, features) for name in ("whole", "killed")
    )
    undisturbed = job("sweep", *words, f"storage={whole}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    records = killed / "cache" / "trials"
    one = "cache/trials/*.json"
    barrier = Barrier.new(tmp_path / "barrier", held=one, after=one, more=1)
    job_killed_at(barrier, "sweep", *words, f"storage={killed}")
    kept = {path: path.read_bytes() for path in records.glob("*.json")}
    assert 2 <= len(kept) < 6, "was done before it was killed"
    again = job("sweep", *words, f"storage={killed}")
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    found, expected = (
        json.loads((run_folder(storage) / "sweep.json").read_text()) for storage in (killed, whole)
    )
    for result in (found, expected):
        for trial in result["trials"]:
            del trial["seconds"]
    assert found == expected


@pytest.mark.slow
def test_two_runs_of_one_seed_give_the_same_numbers(
    first: Finished, backbones: Path, tmp_path: Path
) -> None:
    storage = new_storage(tmp_path, backbones)
    pipeline(storage)
    assert metrics(storage) == metrics(first[0])


def test_a_mistake_is_lines_on_stderr_and_exit_status_2(tmp_path: Path) -> None:
    done = job_here("pipeline", "benchmark=digit", "seeds=0", f"storage={tmp_path}", "shots=few")
    known = ", ".join(group_names("benchmark"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: benchmark=digit: no such benchmark; allowed: {known} (did you mean digits?)",
        "error: shots='few': input should be a valid integer, unable to parse string as an integer",
        "error: seeds=0: input should be greater than or equal to 1",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_mistake_met_on_the_way_is_a_line_too(backbones: Path, tmp_path: Path) -> None:
    storage = new_storage(tmp_path, backbones)
    done = job_here("score", "preset=test", f"storage={storage}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: run ")
    assert "has no embed yet: run python -m jobs.embed" in done.stderr
    assert "Traceback" not in done.stderr
