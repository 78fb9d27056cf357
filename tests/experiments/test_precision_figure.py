"""The table of what bfloat16 costs, from made-up scores."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from pipelines.config import ConfigError
from pipelines.evaluate.scored import Scored
from pipelines.experiments import precision
from pipelines.experiments.result_runs import ResultRun
from pipelines.records import HeadKey

SETS = ["test"] * 300 + ["ood/near/a"] * 200 + ["ood/far/b"] * 100


def run_of(scores: dict[str, np.ndarray]) -> ResultRun:
    zeros = np.zeros(len(SETS), np.int64)
    columns = {f"score_{name}": values for name, values in scores.items()}
    table = pa.table({"set": SETS, "label": zeros, "predicted": zeros, **columns})
    key = HeadKey(method="classifier", seed=0, variant="chosen")
    return ResultRun("made up", None, {key: Scored(table)})  # type: ignore[arg-type]


def test_a_row_is_what_scikit_learn_says_of_both_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    exact = {name: rng.normal(size=600) + (np.arange(600) < 300) for name in ("energy", "knn")}
    reduced = {"energy": exact["energy"], "knn": exact["knn"] + 0.5 * rng.normal(size=600)}

    def opened(words: list[tuple[str, ...]]) -> tuple[list[ResultRun], list[str]]:
        if "backbone=cifar10_resnet20" not in words[0]:
            raise ConfigError(["not there"])
        return [run_of(exact if "backbone.precision=fp32" in words[0] else reduced)], []

    monkeypatch.setattr(precision, "open_runs", opened)
    text = precision.run(tmp_path)

    inside = np.arange(600) < 300
    before, after = (100 * roc_auc_score(inside, side["knn"]) for side in (exact, reduced))
    with (tmp_path / "precision.csv").open() as file:
        energy, knn = csv.DictReader(file)
    assert [energy["score"], float(energy["change"])] == ["energy", 0.0]
    assert float(knn["fp32"]) == pytest.approx(before, abs=1e-3)
    assert float(knn["change"]) == pytest.approx(after - before, abs=1e-3)
    assert float(knn["low"]) < after - before < float(knn["high"])
    assert "over 0.1 point: knn" in text
    assert text.count("Not run yet") == 2 * (len(precision.NETWORKS) - 1)


def test_what_was_never_run_is_named_with_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_words: object) -> None:
        raise ConfigError(["not there"])

    monkeypatch.setattr(precision, "open_runs", nothing)
    with pytest.raises(ConfigError, match=r"backbone\.precision=bf16"):
        precision.run(tmp_path)
