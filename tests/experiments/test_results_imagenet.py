"""Means over draws of the known classes, from made-up metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.evaluate.metrics import Facts, MetricRow, Metrics, Spread, Threshold
from pipelines.experiments import results_all, results_imagenet


def metrics(accuracy: float, auroc: float, score: str = "mcm") -> Metrics:
    def value(mean: float) -> Spread:
        return Spread(mean=mean, std=0.0)

    row = MetricRow(
        method="coop", score=score, params={}, is_criterion=True,
        id_accuracy=value(accuracy), ood_accuracy=value(accuracy / 2), ece=value(0.0),
        aurc=value(0.0), augrc=value(0.0), auroc={"mean": value(auroc), "near": value(0.0)},
        fpr={"mean": value(1 - auroc)}, fpr_ood={}, aupr_id={}, aupr_ood={}, shifted={}, sets={},
        tpr={}, validation_fpr={}, threshold=Threshold(value=0, low=0, high=0, num_images=1),
    )  # fmt: skip
    return Metrics(
        facts=Facts(benchmark="toy", backbone="none"), target_tpr=0.95, seeds=(0,),
        criterion="made up", rows=(row,),
    )  # fmt: skip


def test_means_and_standard_deviations_are_over_the_draws() -> None:
    draws = [metrics(0.30, 0.60), metrics(0.36, 0.61), metrics(0.33, 0.65)]
    table, note, *_ = results_all.tables(results_imagenet.over_draws(draws), over="draws")
    # By hand: deviations -3, 3, 0 give sqrt(18 / 2); -2, -1, 3 give sqrt(14 / 2).
    assert table.splitlines()[2] == (
        "| coop | mcm | 33.0 (3.0) | 16.5 (1.5) | 62.0 (2.6) | 38.0 (2.6) |"
    )
    assert note.startswith("Percent, mean (std) over 3 draws;")


def test_draws_with_other_rows_are_not_averaged() -> None:
    with pytest.raises(ValueError, match="other methods or scores"):
        results_imagenet.over_draws([metrics(0.3, 0.6), metrics(0.3, 0.6, score="energy")])


def test_runs_that_are_missing_are_named_with_their_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_imagenet, "open_runs", lambda words: ([], [" ".join(words[1])]))
    with pytest.raises(UserError) as caught:
        results_imagenet.run(tmp_path)
    assert str(caught.value).splitlines()[1] == (
        "preset=results_imagenet sweep=none benchmark.class_names=imagenet_draws.json#known_2"
    )
