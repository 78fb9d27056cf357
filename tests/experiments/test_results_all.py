"""The tables of docs/results_all.md, from made-up metrics."""

import pytest

from pipelines.config import UserError
from pipelines.evaluate.metrics import Facts, MetricRow, Metrics, Spread, Threshold
from pipelines.experiments import results_all


def row(method, score, auroc, is_criterion=True):
    def value(mean):
        return Spread(mean=mean, std=0.012)

    nothing = {"shifted": {}, "sets": {}, "tpr": {}, "validation_fpr": {}}
    return MetricRow(
        method=method, score=score, params={}, is_criterion=is_criterion,
        id_accuracy=value(0.5), ood_accuracy=value(0.4), ece=value(0.0),
        aurc=value(0.0), augrc=value(0.0),
        auroc={"mean": value(auroc), "far": value(0.0)},
        fpr={"mean": value(1 - auroc), "far": value(0.0)},
        fpr_ood={}, aupr_id={}, aupr_ood={},
        threshold=Threshold(value=0, low=0, high=0, num_images=1),
        **nothing,
    )  # fmt: skip


def metrics(*rows):
    return Metrics(
        facts=Facts(benchmark="toy", backbone="none"), target_tpr=0.95, seeds=(0, 1, 2),
        criterion="made up", rows=rows,
    )  # fmt: skip


ROWS = (
    row("coop", "mcm", 0.6),
    row("coop", "energy", 0.7, is_criterion=False),
    row("linear_probe", "energy", 0.8),
)


def test_selection_criteria_then_every_score_and_a_dash_where_one_does_not_apply():
    chosen, note, _, auroc, _, fpr = results_all.tables(metrics(*ROWS))
    assert chosen.splitlines()[2:] == [
        "| coop | mcm | 50.0 (1.2) | 40.0 (1.2) | 60.0 (1.2) | 40.0 (1.2) |",
        "| linear_probe | energy | 50.0 (1.2) | 40.0 (1.2) | 80.0 (1.2) | 20.0 (1.2) |",
    ]
    assert "3 seeds" in note
    assert auroc.splitlines()[0] == "| method | `mcm` | `energy` |"
    assert auroc.splitlines()[2:] == ["| coop | 60.0 | 70.0 |", "| linear_probe | - | 80.0 |"]
    assert fpr.splitlines()[2:] == ["| coop | 40.0 | 30.0 |", "| linear_probe | - | 20.0 |"]


def test_a_criterion_that_is_not_in_the_run_is_stood_in_for_by_the_first_score():
    rows = (row("coop", "mcm", 0.6, is_criterion=False), *ROWS[1:])
    chosen, *_ = results_all.tables(metrics(*rows))
    assert chosen.splitlines()[2].startswith("| coop | mcm |")


def test_runs_that_are_missing_are_named_with_their_commands(tmp_path, monkeypatch):
    class Opened:
        def has(self, _stage):
            return False

    monkeypatch.setattr(results_all, "load", lambda *_: None)
    monkeypatch.setattr(results_all.Run, "open", lambda *_: Opened())
    with pytest.raises(UserError) as caught:
        results_all.run(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "python -m jobs.pipeline preset=results_all sweep=none",
        "python -m jobs.pipeline preset=results_all sweep=default",
    ]
