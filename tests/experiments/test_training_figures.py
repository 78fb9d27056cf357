"""The figures of docs/training.md, on made-up runs whose numbers are known."""

import csv
import types

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import UserError
from pipelines.evaluate.metrics import Facts, Metrics
from pipelines.evaluate.scored import Scored
from pipelines.experiments import result_runs, training_ablations, training_results
from pipelines.experiments.result_runs import (
    ResultRun,
    accuracy_gain,
    detection_gain,
    open_runs,
    rows,
)
from pipelines.methods import METHODS
from pipelines.records import HeadKey
from pipelines.sweep.result import Choice, SweepResult
from tests.experiments.test_results_all import row
from tests.small_clip import small_clip, toy_data

METHOD_NAMES = ("zero_shot", *training_results.CRITERIA)
SCORES = ("msp", "mcm", "max_logit", "energy", "delta_energy")
SIZES = {"test": 60, "shifted/style": 40, "ood/far/things": 50}


def head(seed, right, gap):
    """Scores of three sets: `right` of the ID images named rightly, OOD `gap` below ID."""
    rng = np.random.default_rng(seed)
    columns = {"set": [], "key": [], "label": [], "predicted": []}
    scores = {f"score_{name}": [] for name in SCORES}
    for name, size in SIZES.items():
        columns["set"] += [name] * size
        columns["key"] += [f"{name}-{i:03d}" for i in range(size)]
        columns["label"] += [0] * size
        columns["predicted"] += [int(i >= right * size) for i in range(size)]
        for number, score in enumerate(scores.values()):
            lower = gap * (1 + number / 10) if name.startswith("ood") else 0.0
            score += (rng.normal(size=size) - lower).tolist()
    return Scored(pa.table({**columns, **scores, "confidence": [0.5] * len(columns["set"])}))


def run_of(name, start):
    heads = {
        HeadKey(method=method, seed=seed): head(
            1000 * start + 10 * number + seed,
            right=0.5 + 0.05 * number + 0.1 * seed,
            gap=0.3 * number,
        )
        for number, method in enumerate(METHOD_NAMES)
        for seed in range(2)
    }
    rows = [row(method, score, 0.5) for method in METHOD_NAMES for score in SCORES]
    facts = Facts(benchmark=name, backbone="none", notes="made up")
    metrics = Metrics(
        facts=facts, target_tpr=0.95, seeds=(0, 1), criterion="made up", rows=tuple(rows)
    )
    return ResultRun(name, metrics, heads)


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr(result_runs, "NUM_RESAMPLES", 20)
    return [run_of("pacs", 1), run_of("second", 2)]


def test_rows_are_means_over_runs_and_deviations_over_seeds(runs):
    table = {(row.method, row.score): row.figures for row in rows(runs)}
    assert len(table) == len(METHOD_NAMES) * len(SCORES)
    mean, std = table["coop", "mcm"]["ID ACC"]  # coop is number 2: 0.6 and 0.7
    assert mean == pytest.approx(0.65)
    assert std == pytest.approx(0.1 / np.sqrt(2))
    aurocs = []
    for seed in range(2):
        parts = []
        for run in runs:
            chosen = run.heads[HeadKey(method="ebm", seed=seed)]
            inside = chosen.sets["test"]["score_mcm"]
            outside = chosen.sets["ood/far/things"]["score_mcm"]
            parts.append(float((inside[:, None] > outside[None, :]).mean()))
        aurocs.append(sum(parts) / 2)
    mean, std = table["ebm", "mcm"]["AUROC"]
    assert mean == pytest.approx(sum(aurocs) / 2, abs=1e-9)
    assert std == pytest.approx(abs(aurocs[0] - aurocs[1]) / np.sqrt(2), abs=1e-9)


def test_gains_are_paired_and_say_whether_they_overlap_nothing(runs):
    gain = accuracy_gain(runs, "balanced_energy", "zero_shot", "test")
    assert gain.value == pytest.approx(0.3)  # six steps of 0.05
    assert gain.low < 0.3 < gain.high
    assert gain.is_clear
    none = accuracy_gain(runs, "ebm", "ebm", "shifted")
    assert (none.value, none.low, none.high) == (0, 0, 0)
    assert not none.is_clear
    better = detection_gain(runs, ("balanced_energy", "energy"), ("zero_shot", "energy"), "auroc")
    worse = detection_gain(runs, ("balanced_energy", "energy"), ("zero_shot", "energy"), "fpr")
    assert better.low > 0 > worse.high


def test_the_results_are_written_as_table_and_picture(runs, tmp_path, monkeypatch):
    digits = [run_of("digits", 3)]
    monkeypatch.setattr(
        training_results,
        "open_runs",
        lambda words: (runs, ["run the third"]) if len(words) > 1 else (digits, []),
    )
    page = training_results.run(tmp_path)
    assert page.count("made up") == 2  # under the tables of either benchmark
    assert "Zhu 2025's claim" in page
    assert "| second | " in page
    assert "Not run yet, so not in the means: `run the third`" in page
    with (tmp_path / "training_results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(METHOD_NAMES) * len(SCORES)
    assert (tmp_path / "training_results.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_missing_are_named_with_their_commands(tmp_path, mini_storage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [("preset=test", f"storage={mini_storage.root}", "seeds=7")]
    with pytest.raises(UserError, match=r"python -m jobs\.pipeline preset=test .*seeds=7"):
        open_runs(words)


@pytest.fixture
def bed(monkeypatch):
    """The toy as a finished run."""
    data = toy_data()

    def config(name):
        training = {"epochs": 2, "batch_size": 48, "lr": 0.02}
        head = {"name": "coop", "num_context": 2}
        return METHODS[name].Config(head=head, training=training)

    criteria = {"ebm": "delta_energy", "energy_margin": "energy", "balanced_energy": "energy"}
    methods = {
        name: Choice(setting=config(name), scores={score: {"tau": 1.0}})
        for name, score in criteria.items()
    }
    sweep = SweepResult(criterion="made up", methods=methods)
    stub = types.SimpleNamespace(swept=sweep)
    found = training_ablations.Bed(stub)
    found.__dict__.update(
        data=data,
        clip=small_clip(),
        test=(data.validation_features, data.validation_labels),
        ood=[data.outliers[:20], data.outliers[20:]],
    )
    return found


def test_ablations_vary_what_they_say(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(training_ablations, "SEEDS", range(1))
    monkeypatch.setattr(training_ablations, "KEEPS", (0.5, 1.0))
    monkeypatch.setattr(training_ablations, "WEIGHTS", (0.0, 2.0))
    monkeypatch.setattr(training_ablations, "SHIFTS", (-1.0, 0.0))
    monkeypatch.setattr(training_ablations, "ALPHAS", (0.0, 1.0))
    monkeypatch.setattr(training_ablations, "GAMMAS", (0.0, 1.0))
    opened = types.SimpleNamespace(open=lambda *_: types.SimpleNamespace(has=lambda _: True))
    monkeypatch.setattr(training_ablations, "Run", opened)
    monkeypatch.setattr(training_ablations, "Bed", lambda _: bed)
    page = training_ablations.run(tmp_path)
    assert "Measured prior of the outliers: zero " in page
    with (tmp_path / "training_ablations.csv").open() as file:
        lines = list(csv.DictReader(file))
    named = [line["ablation"] for line in lines]
    assert {n: named.count(n) for n in named} == {
        "keep, scope": 4,
        "weight, scope": 4,
        "m_in, m_out": 4,
        "alpha, gamma": 4,
    }
    # Without weight the scope changes nothing; keep = 1 neither, for its bound is 0.
    by_setting = {(r["ablation"], r["first"], r["second"]): r["auroc"] for r in lines}
    plain = by_setting["weight, scope", "0", "image"]
    assert by_setting["weight, scope", "0", "top"] == plain
    assert by_setting["keep, scope", "1", "image"] == by_setting["keep, scope", "1", "top"]
    assert by_setting["weight, scope", "2", "image"] != plain
