"""The figure of fine-tuned networks, on a made-up run whose numbers are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import UserError
from pipelines.evaluate.metrics import Facts, Metrics
from pipelines.evaluate.scored import Scored
from pipelines.experiments import network_results, result_runs
from pipelines.experiments.result_runs import ResultRun
from pipelines.records import HeadKey
from tests.experiments.test_results_all import row

METHODS = ("classifier", "network_outlier_exposure", "network_energy")
SIZES = {"test": 40, "ood/near/things": 30, "ood/far/others": 20}
SEEDS = range(2)


def head(number: int, seed: int) -> Scored:
    """Method `number` names 50 + 5 number + 10 seed percent rightly."""
    rng = np.random.default_rng(10 * number + seed)
    right = 0.5 + 0.05 * number + 0.1 * seed
    names = [name for name, size in SIZES.items() for _ in range(size)]
    columns: dict[str, object] = {
        "set": names,
        "key": [f"{name}-{n:03d}" for n, name in enumerate(names)],
        "label": [0] * len(names),
        "predicted": [int(n >= right * SIZES["test"]) for n in range(len(names))],
        "confidence": [0.5] * len(names),
    }
    lower = np.array([0.4 * number * name.startswith("ood") for name in names])
    for score in network_results.SCORES:
        columns[f"score_{score}"] = rng.normal(size=len(names)) - lower
    return Scored(pa.table(columns))


def made_up() -> ResultRun:
    heads = {
        HeadKey(method=name, seed=seed): head(number, seed)
        for number, name in enumerate(METHODS)
        for seed in SEEDS
    }
    rows = tuple(
        row(name, score, 0.6 + 0.1 * number + 0.01 * place)
        for number, name in enumerate(METHODS)
        for place, score in enumerate(network_results.SCORES)
    )
    facts = Facts(benchmark="toy", backbone="none")
    metrics = Metrics(
        facts=facts, target_tpr=0.95, seeds=tuple(SEEDS), criterion="made up", rows=rows
    )
    return ResultRun("toy", metrics, heads)


def auroc(run: ResultRun, method: str, score: str, seed: int) -> float:
    """Pairs of an ID and an OOD image of any set, ID above."""
    table = run.heads[HeadKey(method=method, seed=seed)].table
    is_id = np.array([name == "test" for name in table["set"].to_pylist()])
    values = table[f"score_{score}"].to_numpy()
    return float((values[is_id][:, None] > values[~is_id][None, :]).mean())


def cells(page: str, *start: str) -> list[str]:
    """The cells of the one row that begins so."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines()]
    (found,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return found[len(start) :]


def test_the_tables_say_what_was_gained_and_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = made_up(), []
    monkeypatch.setattr(result_runs, "NUM_RESAMPLES", 20)
    monkeypatch.setattr(
        network_results, "open_runs", lambda words: asked.extend(words) or ([run], [])
    )
    page = network_results.run(tmp_path)
    assert asked == [("preset=results_cifar10_outliers",)]
    _, whole, _, gained, _, accuracy = page.split("\n\n")  # each table after its line
    assert cells(whole, "network_energy", "knn") == ["50.00 (1.20)", "82.0 (1.2)", "18.0 (1.2)"]
    assert len(whole.splitlines()) == 2 + len(METHODS) * len(network_results.SCORES)
    for number, name in enumerate(METHODS[1:], start=1):
        (text,) = cells(accuracy, name)
        assert float(text.split()[0]) == pytest.approx(5 * number)
        for score in network_results.SCORES:
            gains = [
                auroc(run, name, score, seed) - auroc(run, "classifier", score, seed)
                for seed in SEEDS
            ]
            (found, _) = cells(gained, name, score)
            value, low, high = (float(part.strip("[],")) for part in found.split())
            assert value == pytest.approx(100 * np.mean(gains), abs=0.0051)
            assert low <= value <= high
    assert "classifier" not in gained + accuracy
    with (tmp_path / "network_results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["score"]) for line in lines] == [
        (name, score) for name in METHODS for score in network_results.SCORES
    ]
    assert float(lines[-1]["auroc"]) == pytest.approx(82)


def test_a_run_that_is_missing_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened:
        def has(self, _stage: str) -> bool:
            return False

    monkeypatch.setattr(result_runs, "load", lambda *_: None)
    monkeypatch.setattr(result_runs.Run, "open", lambda *_: Opened())
    with pytest.raises(UserError, match=r"jobs\.pipeline preset=results_cifar10_outliers$"):
        network_results.run(tmp_path)
