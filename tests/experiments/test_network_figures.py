"""The tables of docs/networks.md, on a made-up run whose numbers are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.evaluate.metrics import Facts, Metrics
from pipelines.evaluate.scored import Scored
from pipelines.experiments import long_tail_results, network_results, result_runs
from pipelines.experiments.result_runs import ResultRun
from pipelines.records import HeadKey
from tests.experiments.test_results_all import row

# Right of 10 test images of each of 10 classes, the first class first; by method and seed.
RIGHT = {
    "network_cross_entropy": [[9, 9, 9, 6, 6, 6, 6, 1, 1, 1], [8, 8, 8, 5, 5, 5, 5, 0, 0, 0]],
    "pascl": [[9, 9, 9, 6, 6, 6, 6, 1, 1, 1], [8, 8, 8, 5, 5, 5, 5, 0, 0, 0]],
    "pascl_branch": [[7, 8, 9, 6, 7, 6, 7, 5, 4, 3], [7, 8, 9, 6, 7, 6, 7, 3, 2, 1]],
}
# OOD images lie so far below ID.
GAP = {"network_cross_entropy": 0.5, "pascl": 2.5, "pascl_branch": 2.5}


def head(method: str, seed: int) -> Scored:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(10), 10)
    wrong = np.concatenate([np.arange(10) >= right for right in RIGHT[method][seed]])
    ood = np.full(80, -1)
    known, unknown = rng.normal(size=100), rng.normal(size=80) - GAP[method]
    columns = {
        "set": ["test"] * 100 + ["ood/far/things"] * 80,
        "label": np.concatenate([labels, ood]),
        "predicted": np.concatenate([(labels + wrong) % 10, ood]),
    }
    scores = {f"score_{name}": np.concatenate([known, unknown]) for name in ("msp", "energy")}
    return Scored(pa.table({**columns, **scores}))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> ResultRun:
    heads = {HeadKey(method=name, seed=seed): head(name, seed) for name in RIGHT for seed in (0, 1)}
    metrics = Metrics(
        facts=Facts(benchmark="cifar10_lt", backbone="resnet20"),
        target_tpr=0.95,
        seeds=(0, 1),
        criterion="made up",
        rows=tuple(row(name, score, 0.75) for name in RIGHT for score in ("msp", "energy")),
    )
    result = ResultRun("cifar10_lt", metrics, heads)
    monkeypatch.setattr(result_runs, "NUM_RESAMPLES", 50)
    monkeypatch.setattr(long_tail_results, "open_runs", lambda _: ([result], []))
    return result


def table_after(page: str, sentence: str) -> list[list[str]]:
    """The cells of the table that follows a sentence, without its header."""
    lines = page[page.index(sentence) :].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.usefixtures("made_up")
def test_long_tails_are_judged_by_groups_of_classes(tmp_path: Path) -> None:
    page = long_tail_results.run(tmp_path)
    assert table_after(page, "Accuracy by the classes' share") == [
        ["network_cross_entropy", "85.0 (7.1)", "55.0 (7.1)", "5.0 (7.1)"],
        ["pascl", "85.0 (7.1)", "55.0 (7.1)", "5.0 (7.1)"],
        ["pascl_branch", "80.0 (0.0)", "65.0 (0.0)", "30.0 (14.1)"],
    ]


@pytest.mark.usefixtures("made_up")
def test_gains_are_over_cross_entropy(tmp_path: Path) -> None:
    page = long_tail_results.run(tmp_path)
    accuracy = dict(table_after(page, "ID accuracy, points gained over cross-entropy"))
    assert accuracy["pascl"] == "+0.00 [+0.00, +0.00]"
    # 62 and 56 right of 100, and 54 and 44.
    assert accuracy["pascl_branch"].startswith("+10.00 [")
    detection = table_after(page, "Points gained over cross-entropy under the same score")
    assert [cells[:2] for cells in detection] == [
        [name, score] for name in ("pascl", "pascl_branch") for score in ("msp", "energy")
    ]
    for _, _, auroc, fpr in detection:
        assert float(auroc.partition("[")[2].partition(",")[0]) > 5
        assert float(fpr.partition(", ")[2].rstrip("]")) < -5


@pytest.mark.usefixtures("made_up")
def test_the_figures_are_those_of_the_run(tmp_path: Path) -> None:
    page = long_tail_results.run(tmp_path)
    assert table_after(page, "Percent, mean and")[0] == [
        "network_cross_entropy", "msp", "50.00 (1.20)", "75.0 (1.2)", "25.0 (1.2)",
    ]  # fmt: skip
    with (tmp_path / "long_tail_results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert float(lines[0]["auroc"]) == pytest.approx(75)


def test_fine_tuned_networks_are_compared_with_the_pretrained_one(
    made_up: ResultRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_results, "open_runs", lambda _: ([made_up], []))
    monkeypatch.setattr(network_results, "PRETRAINED", "pascl")
    monkeypatch.setattr(network_results, "SCORES", ("energy",))
    page = network_results.run(tmp_path)
    rows = table_after(page, "Points gained over the pretrained network")
    assert [cells[:2] for cells in rows] == [
        ["network_cross_entropy", "energy"],
        ["pascl_branch", "energy"],
    ]
    assert (tmp_path / "network_results.csv").exists()


@pytest.mark.parametrize(
    ("num_classes", "many", "few"), [(10, range(3), range(7, 10)), (100, range(34), range(68, 100))]
)
def test_groups_of_classes(num_classes: int, many: range, few: range) -> None:
    # As the public code of Wang 2022 has them: for CIFAR-10 many 0-2, median 3-6, few 7-9.
    found = long_tail_results.groups(num_classes)
    assert (found[0], found[2]) == (many, few)
    assert sorted(c for group in found for c in group) == list(range(num_classes))
