"""What a sweep's trials say, against rules that made them up and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.sweep import evidence as facts
from pipelines.sweep import importance
from pipelines.sweep.result import SweepResult
from tests.sweep_record import (
    SURFACE,
    choice,
    failed,
    grid,
    record,
    result,
    sampled,
    surface,
    trial,
)

Sweep = tuple[SweepResult, pa.Table]


@pytest.fixture(scope="module")
def made() -> Sweep:
    return record()


class TestImportance:
    def test_a_grid_is_taken_apart_exactly(self) -> None:
        found = importance.of_training(grid(), "delta_energy")
        assert found is not None
        # Steps of 0.01 and 0.02 on three values each: variances 1 to 4, nothing together.
        assert found.shares == pytest.approx({"training.lr": 0.2, "training.epochs": 0.8})
        assert (found.num, found.how) == (9, importance.GRID)

    def test_what_settings_do_together_belongs_to_neither(self) -> None:
        signs = [(x, y) for x in (-1, 1) for y in (-1, 1)] * 2
        trials = [
            trial("coop", n, {"a": x, "b": y, "twin": n // 4}, 0.9 + 0.01 * x * y)
            for n, (x, y) in enumerate(signs)
        ]
        found = importance.of_training(trials, "mcm")
        assert found is not None
        assert found.shares == pytest.approx({"a": 0, "b": 0, "twin": 0}, abs=1e-12)

    def test_a_forest_ranks_random_samples_by_what_they_do(self) -> None:
        found = importance.of_training(sampled(), "delta_energy")
        assert found is not None
        assert (found.num, found.how) == (57, importance.FOREST)  # neither failed nor stopped ones
        order = sorted(found.shares, key=lambda key: -found.shares[key])
        assert order[:2] == ["training.lr", "weight"]
        assert found.shares["training.lr"] > 0.8
        assert sum(found.shares.values()) <= 1
        assert max(found.shares["keep"], found.shares["scope"]) < 0.01

    def test_chance_explains_nothing(self) -> None:
        random = np.random.default_rng(1)
        trials = [
            trial("ebm", n, {"a": float(random.random()), "b": float(random.random())},
                  0.9 + random.normal(0, 0.01))
            for n in range(40)
        ]  # fmt: skip
        found = importance.of_training(trials, "delta_energy")
        assert found is not None
        assert found.shares == {}
        assert "nothing to show" in found.note

    @pytest.mark.parametrize(
        ("trials", "note"),
        [
            (sampled(20), "too few trials: 17 are done, 4 settings that are no grid need 24"),
            (
                [trial("ebm", n, {"a": n // 2, "b": n % 2}, 0.9 + n / 100) for n in range(4)],
                "too few trials: 4 are done, 2 settings in a grid need 8",
            ),
            (
                [trial("ebm", n, {"a": n}, 0.9 + n / 100) for n in range(9)],
                "only a varied: there is nothing to weigh it against",
            ),
        ],
    )
    def test_where_it_cannot_be_said_it_is_not(self, trials: Any, note: str) -> None:
        found = importance.of_training(trials, "delta_energy")
        assert found is not None
        assert (found.shares, found.note) == ({}, note)

    def test_one_setting_of_everything_has_none(self) -> None:
        assert importance.of_training([trial("zero_shot", 0, {}, 0.9)], "mcm") is None
        assert importance.of_training([], "mcm") is None

    def test_of_a_surface(self) -> None:
        rows = [row for row in surface("ebm", 0) if row["score"] == "delta_energy"]
        found = importance.of_surface(rows, ["tau", "c"])
        assert found is not None
        # The rule is additive: its parts' variances, over 24 taus and three c.
        tau = np.var([0.02 * np.log10(t / 0.5) ** 2 for t in np.geomspace(0.02, 5, 24)])
        c = np.var([0.01 * (c - 1.8) ** 2 for c in (1, 2, 3)])
        assert found.shares == pytest.approx({"tau": tau / (tau + c), "c": c / (tau + c)})
        assert found.num == 72


def test_the_front_is_what_nothing_beats(made: Sweep) -> None:
    points = facts.pareto(made[0])
    assert len(points) == 67  # 9 and 58 of 60: the failed ones have no figure
    for point in points:
        beaten = False
        for other in points:
            better = other.accuracy > point.accuracy or other.fpr < point.fpr
            worse = other.accuracy < point.accuracy or other.fpr > point.fpr
            beaten |= better and not worse
        assert point.front == (not beaten)
    assert 1 < sum(point.front for point in points) < len(points)


class TestEdges:
    def test_each_is_named_with_its_range(self, made: Sweep) -> None:
        found = list(facts.edges(*made))
        places = {(e.method, e.score, e.key, e.is_criterion) for e in found}
        # coop took the last trial of its grid; mcm is the better the larger tau is.
        assert places == {
            ("coop", "", "training.lr", True),
            ("coop", "", "training.epochs", True),
            ("coop", "mcm", "tau", True),
            ("ebm", "mcm", "tau", False),
        }
        (tau,) = [e for e in found if (e.method, e.key) == ("ebm", "tau")]
        assert tau.sentence == (
            "ebm + mcm: the best value of tau (5) is at the edge of its space (0.02 to 5); a wider "
            "one may hold a better"
        )

    @pytest.mark.parametrize(
        ("value", "tried", "edge"),
        [
            (1.0, [0.01, 0.1, 1.0], True),
            (0.1, [0.01, 0.1, 1.0], False),
            (0.012, [0.01, 0.1, 1.0], True),  # 4 % of two decades
            (0.05, [0.01, 0.1, 1.0], False),  # on a linear axis it would be
            (1.0, [0.5, 1.0], False),  # of two values each is an end
            ("image", ["image", "batch", "both"], False),
            (True, [True, False], False),
        ],
    )
    def test_of_a_training_setting(self, value: Any, tried: list[Any], edge: bool) -> None:
        trials = [trial("ebm", n, {"weight": v}, 0.9) for n, v in enumerate(tried)]
        best = (
            trials[tried.index(value)] if value in tried else trial("ebm", 9, {"weight": value}, 0)
        )
        found = facts.edges(result({"ebm": choice(best, "mcm", {})}, trials))
        assert bool(list(found)) == edge

    def test_where_no_wider_space_is_possible_it_is_silent(self) -> None:
        keeps = [0.25, 0.5, 1.0]  # a share: 1 is all
        trials = [trial("ebm", n, {"keep": keep}, 0.9) for n, keep in enumerate(keeps)]
        rows = [{**row, "c": c, "tau": 1.0} for row in surface("ebm", 2)[:1] for c in (1.0, 2, 3)]

        def edges(keep: float, c: int) -> list[str]:
            best, scores = trials[keeps.index(keep)], {"delta_energy": {"c": c, "tau": 1.0}}
            sweep = result({"ebm": choice(best, "delta_energy", scores)}, trials)
            table = pa.Table.from_pylist(rows, SURFACE)
            return [edge.key for edge in facts.edges(sweep, table)]

        assert edges(1.0, 1) == []
        assert edges(0.25, 3) == ["keep", "c"]


def test_budget_counts_how_trials_ended(made: Sweep) -> None:
    coop, ebm = facts.budget(made[0].trials)
    assert (coop.done, coop.stopped, coop.failed, coop.seconds) == (9, 0, 0, 18)
    assert (ebm.done, ebm.stopped, ebm.failed, ebm.seconds) == (57, 1, 2, 117)
    (reason,) = ebm.reasons
    assert (reason.reason, reason.trials) == ("the loss became NaN in epoch 2", 2)


def test_a_criterion_that_was_not_judged_is_the_mean_of_what_was() -> None:
    one = trial("coop", 0, {}, 0.8)
    found = one.by("energy")
    assert found is not None
    assert found.auroc == pytest.approx(0.79)  # of 0.78 and 0.8
    assert one.by("mcm") == (0.8 - 0.02, 1.02 - 0.8)
    assert failed("coop", 0, {}, "no memory").by("mcm") is None


def test_the_evidence_is_read_back_as_it_was(made: Sweep) -> None:
    found = facts.evidence(*made)
    assert facts.Evidence.from_json(found.to_json(), "evidence.json") == found
    assert [(one.method, one.of) for one in found.importance] == [
        ("coop", "training settings"),
        ("coop", "mcm"),
        ("ebm", "training settings"),
        ("ebm", "delta_energy"),
    ]
    alone = made[0].model_copy(update={"trials": (failed("coop", 0, {"a": 1}, "no memory"),)})
    nothing = facts.evidence(alone)
    assert nothing.pareto == ()
    (reason,) = nothing.budget[0].reasons
    assert (reason.reason, reason.trials) == ("no memory", 1)
