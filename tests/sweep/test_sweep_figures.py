"""A sweep's pictures show its trials, mark what failed and ring what was chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipelines import plots
from pipelines.sweep import evidence, importance
from pipelines.sweep import figures as sweep_figures
from pipelines.sweep.axes import Scale
from tests.sweep_record import choice, record, result, sampled, surface, trial


def texts(figure: Figure) -> set[str]:
    return {found.get_text() for found in figure.findobj(Text)}


def lines(figure: Figure, **wanted: Any) -> list[np.ndarray]:
    """The data of the first axes' lines with these properties."""
    return [
        np.asarray(line.get_xydata())
        for line in figure.axes[0].lines
        if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())
    ]


@pytest.mark.slow
def test_every_picture_is_drawn_once_and_as_png() -> None:
    drawn = list(sweep_figures.drawn(*record()))
    assert [name for name, *_ in drawn] == [
        "parallel-coop",
        "contour-coop",
        "surface-coop-mcm",
        "surface-coop-delta_energy",
        "fpr-coop-mcm",
        "parallel-ebm",
        "contour-ebm",
        "surface-ebm-delta_energy",
        "fpr-ebm-delta_energy",
        "importance",
        "pareto",
    ]
    pages = [plots.svg(figure, title) for _, title, figure in drawn]
    again = [plots.svg(figure, title) for _, title, figure in sweep_figures.drawn(*record())]
    assert pages == again
    assert not any("http" in page.replace("http://www.w3.org", "") for page in pages)
    assert plots.png(drawn[1][2]).startswith(b"\x89PNG\r\n")


def test_nothing_to_show_is_no_picture() -> None:
    one = trial("coop", 0, {}, 0.9)
    methods = {"coop": choice(one, "mcm", {"mcm": {"tau": 1.0}})}
    assert list(sweep_figures.drawn(result(methods, [one]))) == []
    assert list(sweep_figures.drawn(result(methods, []))) == []


@pytest.fixture(scope="module")
def figure() -> Figure:
    """The parallel coordinates of the random samples."""
    trials = sampled()
    judged = [trial for trial in trials if trial.scores]
    best = max(judged, key=lambda t: t.scores["delta_energy"].auroc)
    found = sweep_figures.parallel(trials, "delta_energy", best.settings)
    assert found is not None
    return found


class TestParallel:
    def test_an_axis_for_each_setting_and_result(self, figure: Figure) -> None:
        names = {"training.lr", "weight", "keep", "scope", "ID accuracy (%)", "AUROC (%)"}
        assert names <= texts(figure)
        # Over decades round powers are written, words as they are.
        assert {"0.001", "0.01", "0.1", "image", "batch", "0.25"} <= texts(figure)

    def test_failed_trials_end_in_a_cross_and_the_stopped_one_is_dotted(
        self, figure: Figure
    ) -> None:
        crosses = [xy for xy in lines(figure, marker="x") if len(xy) == 1]
        assert len(crosses) == 2
        assert "failed (2)" in texts(figure)
        assert len([xy for xy in lines(figure, linestyle=":") if len(xy) == 6]) == 1

    def test_the_chosen_trial_is_the_thick_line_that_ends_highest(self, figure: Figure) -> None:
        (thick,) = [xy for xy in lines(figure, linewidth=3.4) if len(xy)]
        assert thick[-1].tolist() == [5, 1]  # the last axis, its top
        rest = [xy for xy in lines(figure, linewidth=1.4) if len(xy) == 6]
        assert len(rest) == 57  # 56 that are done, one stopped
        assert all(0 <= xy[:, 1].min() <= xy[:, 1].max() <= 1 for xy in rest)


def test_a_contour_is_over_the_two_settings_that_matter_most() -> None:
    trials = sampled()
    measured = importance.of_training(trials, "delta_energy")
    figure = sweep_figures.contour(
        trials, "delta_energy", {"training.lr": 0.01, "weight": 2.0}, measured
    )
    assert figure is not None
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training.lr", "weight")
    lrs = [float(str(t.settings["training.lr"])) for t in trials if t.status != "failed"]
    (ring,) = lines(figure, markersize=13)
    expected = np.log(0.01 / min(lrs)) / np.log(max(lrs) / min(lrs))
    assert ring[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [
        [{"a": n, "b": 2 * n} for n in range(8)],  # on one line
        [{"a": n // 2, "b": n % 2} for n in range(4)],  # four corners
        [{"a": n, "b": "word"} for n in range(8)],
    ],
)
def test_no_contour_without_a_plane(settings: list[dict[str, Any]]) -> None:
    made = [trial("ebm", n, s, 0.9 + n / 100) for n, s in enumerate(settings)]
    assert sweep_figures.contour(made, "mcm", settings[0]) is None


def test_a_surface_is_a_line_for_each_c_with_the_chosen_place_ringed() -> None:
    rows = [row for row in surface("ebm", 0) if row["score"] == "delta_energy"]
    taus = sorted({row["tau"] for row in rows})
    figure = sweep_figures.surface(rows, {"tau": float(f"{taus[13]:.3g}"), "c": 2})
    assert figure is not None
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_xscale()) == ("tau", "log")
    assert {"c = 1", "c = 2", "c = 3"} <= texts(figure)
    (ring,) = lines(figure, markersize=13)
    (auroc,) = [100 * row["auroc"] for row in rows if (row["tau"], row["c"]) == (taus[13], 2)]
    assert ring[0].tolist() == pytest.approx([taus[13], auroc])
    curve = next(
        np.asarray(line.get_xydata()) for line in axes.lines if line.get_label() == "c = 3"
    )
    assert curve.tolist() == [
        pytest.approx([row["tau"], 100 * row["auroc"]]) for row in rows if row["c"] == 3
    ]


def test_the_fpr_of_a_surface_is_its_own_column() -> None:
    rows = [row for row in surface("coop", 0) if row["score"] == "mcm"]
    rows = [{**row, "fpr": 0.3 + 0.01 * place} for place, row in enumerate(rows)]
    figure = sweep_figures.surface(rows, {"tau": rows[2]["tau"]}, "FPR")
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "validation FPR (%)"
    (curve,) = [xy for xy in lines(figure, marker=".") if len(xy)]
    assert curve.tolist() == [pytest.approx([r["tau"], 100 * r["fpr"]]) for r in rows]
    (ring,) = lines(figure, markersize=13)
    assert ring[0].tolist() == pytest.approx([rows[2]["tau"], 32.0])


class TestMarginMap:
    def made(self, aurocs: dict[tuple[int, int, float], float]) -> list[Any]:
        return [
            trial("network", n, {"m_in": a, "m_out": b, "training.lr": lr}, auroc)
            for n, ((a, b, lr), auroc) in enumerate(aurocs.items())
        ]

    def test_auroc_and_fpr_over_both_with_the_best_trial_of_a_place(self) -> None:
        # Two rates at each pair: the larger one is better by a point everywhere.
        aurocs = {
            (a, b, lr): 0.8 + 0.01 * n + (0.01 if lr > 0.01 else 0)
            for lr in (0.001, 0.1)
            for n, (a, b) in enumerate(((-9, -6), (-9, -3), (-7, -6), (-7, -3), (-5, -3), (-5, -1)))
        }
        chosen = {"m_in": -7, "m_out": -3, "training.lr": 0.1}
        figure = sweep_figures.margin_map(self.made(aurocs), "delta_energy", chosen)
        assert figure is not None
        area, rate = figure.axes[:2]
        assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in (area, rate)} == {
            ("m_in", "m_out")
        }
        assert {"validation AUROC (%)", "validation FPR (%)"} <= texts(figure)
        for axes in (area, rate):
            (ring,) = [line for line in axes.lines if line.get_markersize() == 13]
            assert ring.get_xydata().tolist() == [[0.5, pytest.approx(3 / 5)]]
            assert len(axes.lines) == 6 + 1
        # FPR is 1 - AUROC here: the same places, the least colour where the other has the most.
        best = [_colours_of(axes) for axes in (area, rate)]
        assert best[0][(1.0, 1.0)] == best[1][(0.0, 0.0)]
        assert best[0][(0.0, 0.0)] == best[1][(1.0, 1.0)]

    def test_nothing_where_one_margin_or_none_was_searched(self) -> None:
        one = [
            trial("network", n, {"m_in": -9 - n, "m_out": -3, "w": n % 3}, 0.9) for n in range(9)
        ]
        assert sweep_figures.margin_map(one, "mcm", {}) is None
        assert sweep_figures.margin_map(sampled(), "mcm", {}) is None
        assert sweep_figures.margin_map([], "mcm", {}) is None


def _colours_of(axes: Any) -> dict[tuple[float, float], Any]:
    dots = [line for line in axes.lines if line.get_markersize() == 6]
    return {tuple(map(float, d.get_xydata()[0])): d.get_color() for d in dots}


def test_bars_state_their_share() -> None:
    found = importance.Importance(
        method="ebm", of="training settings", num=9, shares={"a": 0.2, "b": 0.755}
    )
    figure = sweep_figures.importance_bars([found])
    assert {"ebm, 9 trials", "20 %", "76 %"} <= texts(figure)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [75.5, 20.0]


def test_the_front_rings_the_chosen_trials() -> None:
    sweep, _ = record()
    points = evidence.pareto(sweep)
    chosen = sweep_figures.chosen_trials(sweep)
    figure = sweep_figures.front(points, chosen)
    rings = sorted(xy[0].tolist() for xy in lines(figure, markersize=13))
    expected = sorted(
        [100 * p.fpr, 100 * p.accuracy] for p in points if (p.method, p.trial) in chosen
    )
    assert rings == expected
    assert len(rings) == 2


@pytest.mark.parametrize(
    ("tried", "value", "place"),
    [
        ([0.001, 1.0, 0.1], 0.1, 2 / 3),
        ([1, 2, 4], 2, 1 / 3),
        (["b", "a", "c"], "a", 0.5),
        ([5, 5], 5, 0.5),
        ([None, 3], 3, 1),
    ],
)
def test_places_on_an_axis(tried: list[Any], value: Any, place: float) -> None:
    assert Scale.of("x", tried).place(value) == pytest.approx(place)


def test_crowded_values_give_way_to_round_ones() -> None:
    scale = Scale.of("x", [float(v) for v in np.linspace(1.03, 4.9, 40)])
    written = [text for _, text in scale.ticks]
    assert written == ["2", "3", "4"]
    log = Scale.of("x", [float(v) for v in np.geomspace(0.03, 3.3, 40)])
    assert [text for _, text in log.ticks] == ["0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert {text: place for place, text in log.ticks}["1"] == pytest.approx(log.place(1.0))
