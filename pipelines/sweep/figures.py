"""Pictures of a sweep: its trials, what mattered, the post-hoc surface, accuracy against FPR.

Drawn from `SweepResult`, the surfaces of the chosen trials and `pipelines.sweep.evidence`, in the
look of `pipelines.plots`. Colour is validation AUROC (or FPR), the same scale in a figure. Optuna's
own pictures are not used: they leave out failed and stopped trials and the chosen one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from pipelines.plots import COLOURS, LINE, MUTED, PAPER, new_figure
from pipelines.sweep import evidence, importance, surfaces
from pipelines.sweep.axes import Scale
from pipelines.sweep.evidence import ParetoPoint
from pipelines.sweep.importance import Importance, is_number, spans_decades, varied
from pipelines.sweep.marks import (
    AUROC,
    FPR,
    colour_bar,
    colour_map,
    colour_of,
    judged,
    ring,
)
from pipelines.sweep.planes import contour, margin_map
from pipelines.sweep.result import ScoreParams, Settings, SweepResult, Trial
from pipelines.sweep.surfaces import Row

_BLUE, _VERMILION, _ORANGE = COLOURS[0], COLOURS[1], COLOURS[4]
_MARKERS = "osD^vPX<>hp*"
_SHOWN = 200  # trials of one picture: the best of more
_DELTA_ENERGY = "delta_energy"


def drawn(sweep: SweepResult, table: pa.Table | None = None) -> Iterator[tuple[str, str, Figure]]:
    """Every picture that the sweep has something for: file name without suffix, title, figure.

    Args:
        sweep: its result.
        table: the surfaces of the chosen trials, or None.
    """
    bars = []
    for method, choice in sweep.methods.items():
        trials, criterion = sweep.of(method), choice.setting.score
        measured = importance.of_training(trials, criterion)
        if (figure := parallel(trials, criterion, choice.chosen)) is not None:
            yield f"parallel-{method}", f"{method}: one line a trial", figure
        if (figure := contour(trials, criterion, choice.chosen, measured)) is not None:
            yield f"contour-{method}", f"{method}: two settings", figure
        if (figure := margin_map(trials, criterion, choice.chosen)) is not None:
            yield f"margins-{method}", f"{method}: the two margins", figure
        for score in dict.fromkeys((criterion, _DELTA_ENERGY)):
            rows = surfaces.of_score(table, method, score)
            if (figure := surface(rows, choice.scores.get(score, {}))) is not None:
                yield f"surface-{method}-{score}", f"{method} + {score}, chosen head", figure
        rows = surfaces.of_score(table, method, criterion)
        if (figure := surface(rows, choice.scores.get(criterion, {}), FPR)) is not None:
            yield f"fpr-{method}-{criterion}", f"{method} + {criterion}, chosen head: FPR", figure
        of_score = evidence.criterion_surface(sweep, table, method)
        bars += [one for one in (measured, of_score) if one is not None and one.shares]
    if bars:
        yield "importance", "What explains the validation AUROC", importance_bars(bars)
    points = evidence.pareto(sweep)
    if len(points) > 1:
        yield "pareto", "ID accuracy against FPR", front(points, chosen_trials(sweep))


def chosen_trials(sweep: SweepResult) -> set[tuple[str, int]]:
    """(method, number) of the chosen trials."""
    chosen = {(name, choice.trial) for name, choice in sweep.methods.items()}
    return {(method, number) for method, number in chosen if number is not None}


def parallel(trials: Sequence[Trial], criterion: str, chosen: Settings) -> Figure | None:
    """Each trial as a line through its settings to its accuracy and AUROC; the chosen one thick.

    A failed trial is dashed and ends in a cross behind its settings; a stopped one is dotted.
    """
    keys, known = varied(trials), judged(trials, criterion)
    if not keys or len(known) < 2:
        return None
    known = known[-_SHOWN:]
    failed = [trial for trial in trials if trial.status == "failed"][:_SHOWN]
    every = [*(trial for trial, _ in known), *failed]
    scales = [Scale.of(key, [trial.settings.get(key) for trial in every]) for key in keys]
    scales.append(Scale.of("ID accuracy (%)", [100 * (t.accuracy or 0) for t, _ in known]))
    scales.append(Scale.of("AUROC (%)", [100 * auroc for _, auroc in known]))
    colours = colour_map([auroc for _, auroc in known])
    with new_figure(1.25 * len(scales) + 1.6, 3.3) as figure:
        axes = figure.subplots()
        for trial, auroc in known:
            values = [*map(trial.settings.get, keys), 100 * (trial.accuracy or 0), 100 * auroc]
            best = trial.status == "done" and trial.settings == chosen
            axes.plot(
                range(len(scales)),
                [scale.place(value) for scale, value in zip(scales, values, strict=True)],
                color=colour_of(colours, 100 * auroc),
                linewidth=3.4 if best else 1.4,
                linestyle=":" if trial.status == "stopped" else "-",
                zorder=4 if best else 3,
            )
        for trial in failed:
            places = [scales[i].place(trial.settings.get(key)) for i, key in enumerate(keys)]
            _failed_line(axes, places)
        _upright(axes, scales)
        colour_bar(figure, axes, colours)
        _line_legend(axes, trials)
    return figure


def surface(rows: Sequence[Row], chosen: ScoreParams, of: str = AUROC) -> Figure | None:
    """AUROC or FPR over one parameter, a line for each value of another; the choice ringed.

    The first is tau where it varied, else k, gamma or c. Of more than two, the best setting at a
    place stands for it.
    """
    along, other = _varied_parameters(rows)
    if along is None:
        return None
    with new_figure(4.4, 3.1) as figure:
        axes = figure.subplots()
        for number, value in enumerate(_values(rows, other) if other else [None]):
            line = _line(rows, along, (other, value), of)
            colour = COLOURS[number % len(COLOURS)]
            marker = "." if len(line) <= 40 else ""
            label = f"{other} = {value:g}" if other and value is not None else None
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, label=label)
            if value == (chosen.get(other) if other else None) and along in chosen:
                x, y = min(line, key=lambda point: abs(point[0] - chosen[along]))
                ring(axes, x, y)
        if spans_decades(_values(rows, along)):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=along, ylabel=f"validation {of} (%)")
        axes.grid(color=LINE, linewidth=0.6)
        axes.margins(y=0.12)
        if other:
            _legend_below(axes)
    return figure


def _varied_parameters(rows: Sequence[Row]) -> tuple[str | None, str | None]:
    """What a surface is drawn over, and what its lines are; None where nothing more varied."""
    known = ("tau", "k", "gamma", "c", "weight")
    names = [name for name in known if len(_values(rows, name)) > 1]
    return (*names, None, None)[0], next((name for name in reversed(names[1:])), None)


def _line(
    rows: Sequence[Row], along: str, fixed: tuple[str | None, float | None], of: str
) -> list[tuple[float, float]]:
    """Places and the figure in percent of the settings with one value of another parameter."""
    other, value = fixed
    better = max if of == AUROC else min
    best: dict[float, float] = {}
    for row in rows:
        place, figure = row[along], row[of.lower()]
        assert is_number(place)
        assert is_number(figure)
        if other is None or row[other] == value:
            best[place] = better(best.get(place, 100 * figure), 100 * figure)
    return sorted(best.items())


def importance_bars(shown: Sequence[Importance]) -> Figure:
    """The share of each setting, a block of bars for each method and what is varied."""
    lines = sum(len(one.shares) for one in shown) + len(shown)
    with new_figure(4.8, 0.27 * lines + 0.7) as figure:
        axes = figure.subplots()
        at, names, spots = 0, [], []
        for one in shown:
            trained = one.of == importance.TRAINING
            count = f"{one.num} trials" if trained else f"{one.num} settings of {one.of}"
            side: dict[str, Any] = {"va": "center", "fontsize": 8.5}
            axes.text(0, at, f"{one.method}, {count}", fontweight="bold", **side)
            for key, share in sorted(one.shares.items(), key=lambda item: -item[1]):
                at += 1
                names.append(key)
                spots.append(at)
                axes.barh(at, 100 * share, 0.62, color=_BLUE if trained else _ORANGE)
                axes.text(100 * share + 1.5, at, f"{100 * share:.0f} %", **side)
            at += 1
        axes.set_yticks(spots, names)
        axes.set(ylim=(at - 0.4, -0.6), xlim=(0, 112))
        axes.set_xlabel("share of the change in validation AUROC (%)")
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.tick_params(axis="y", length=0)
    return figure


def front(points: Sequence[ParetoPoint], chosen: set[tuple[str, int]]) -> Figure:
    """FPR against ID accuracy of every trial: up and to the left is better; chosen ones ringed."""
    with new_figure(4.6, 3.5) as figure:
        axes = figure.subplots()
        best = sorted((100 * p.fpr, 100 * p.accuracy) for p in points if p.front)
        style: dict[str, Any] = {"color": MUTED, "linewidth": 1, "zorder": 1}
        axes.step(*zip(*best, strict=True), where="post", label="Pareto front", **style)
        for number, method in enumerate(dict.fromkeys(point.method for point in points)):
            of_method = [point for point in points if point.method == method]
            axes.plot(
                [100 * point.fpr for point in of_method],
                [100 * point.accuracy for point in of_method],
                _MARKERS[number % len(_MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                markersize=5.5,
                alpha=0.85,
                label=method,
            )
        for point in points:
            if (point.method, point.trial) in chosen:
                ring(axes, 100 * point.fpr, 100 * point.accuracy)
        axes.set_xlabel("FPR at 95 % TPR, validation OOD (%)")
        axes.set_ylabel("ID validation accuracy (%)")
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(0.08)
        _legend_below(axes)
    return figure


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return sorted({value for row in rows if is_number(value := row.get(key))})


def _failed_line(axes: Axes, places: Sequence[float]) -> None:
    end = len(places) - 0.62
    axes.plot(
        [*range(len(places)), end], [*places, places[-1]], "--", color=_VERMILION, linewidth=1
    )
    axes.plot([end], places[-1:], "x", color=_VERMILION, markersize=7, markeredgewidth=2)


def _upright(axes: Axes, scales: Sequence[Scale]) -> None:
    """One upright axis for each scale, its values to the left of it, its name above."""
    for at, scale in enumerate(scales):
        axes.axvline(at, color=MUTED, linewidth=0.8, zorder=2)
        for place, text in scale.ticks:
            axes.plot([at - 0.02, at], [place, place], color=MUTED, linewidth=0.8)
            axes.annotate(
                text, (at, place), (-4, 0), textcoords="offset points", ha="right", va="center",
                fontsize=7.5, zorder=5, bbox={"facecolor": PAPER, "edgecolor": "none",
                "alpha": 0.75, "pad": 0.6},
            )  # fmt: skip
        axes.text(at, 1.07, scale.name, ha="center", va="bottom", fontsize=8.5)
    axes.set(xlim=(-0.45, len(scales) - 0.85), ylim=(-0.04, 1.04), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _line_legend(axes: Axes, trials: Sequence[Trial]) -> None:
    """What a thick, a dotted and a dashed line mean, as far as there are any."""
    kinds = {trial.status for trial in trials}
    style: dict[str, Any] = {"color": MUTED}
    axes.plot([], [], linewidth=3.4, label="chosen", **style)
    if "stopped" in kinds:
        axes.plot([], [], linestyle=":", linewidth=1.4, label="stopped early", **style)
    if "failed" in kinds:
        num = sum(trial.status == "failed" for trial in trials)
        axes.plot([], [], "x--", color=_VERMILION, linewidth=1, label=f"failed ({num})")
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside lower center", ncols=min(count, 4), handlelength=2)
