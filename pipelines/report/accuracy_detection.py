"""The picture of accuracy against detection: a point per method, and the Pareto front.

Labels stand in a column beside the axes, each with a line to its point, so that twenty methods
stay readable; colours are those of the scores (Okabe and Ito's), shapes distinguish the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.ood.pareto import pareto_front
from pipelines.plots import INK, LINE, MUTED, new_figure
from pipelines.report.figures import score_style
from pipelines.report.tables import Value

_MARKERS = "osD^vPX<>hp*"
_PITCH = 0.17  # inches from one label to the next


@dataclass(frozen=True)
class Point:
    """A method judged by a score: means and deviations over seeds, as shares of 1."""

    method: str
    score: str
    accuracy: Value
    auroc: Value

    @property
    def place(self) -> tuple[float, float]:
        """Accuracy and AUROC in percent."""
        return 100 * self.accuracy.mean, 100 * self.auroc.mean


def front_of(points: Sequence[Point]) -> list[Point]:
    """The Pareto front of points, by accuracy; of equal points all are on it."""
    front = pareto_front(np.array([point.place for point in points]))
    chosen = [point for point, on_front in zip(points, front, strict=True) if on_front]
    return sorted(chosen, key=lambda point: point.place)


def accuracy_detection(labelled: Sequence[Point], others: Sequence[Point], x_label: str) -> Figure:
    """Up and to the right is better.

    Args:
        labelled: every method under its selection criterion, with the Pareto front over them.
        others: the methods under other scores, shown small.
        x_label: the kind of accuracy.
    """
    front = front_of(labelled)
    with new_figure(6.6, max(3.6, _PITCH * len(labelled) + 1.3)) as figure:
        axes = figure.subplots()
        if others:
            x, y = zip(*(p.place for p in others), strict=True)
            axes.plot(x, y, "o", color=MUTED, alpha=0.35, markersize=2.5, markeredgewidth=0)
        names = list(dict.fromkeys(p.score for p in labelled))
        for number, point in enumerate(labelled):
            _draw(axes, point, names, _MARKERS[number % len(_MARKERS)])
        axes.margins(0.06)
        _draw_front(axes, front)
        axes.set(xlabel=x_label, ylabel="AUROC, mean of OOD sets (%)")
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        _explain(figure, bool(others))
        _label(figure, axes, labelled, front)
    return figure


def _draw(axes: Axes, point: Point, scores: Sequence[str], marker: str) -> None:
    colour, _ = score_style(point.score, scores)
    x, y = point.place
    axes.errorbar(
        x,
        y,
        xerr=100 * (point.accuracy.std or 0.0) or None,
        yerr=100 * (point.auroc.std or 0.0) or None,
        color=colour,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        elinewidth=0.8,
        alpha=0.95,
    )


def _draw_front(axes: Axes, front: Sequence[Point]) -> None:
    """A step line from edge to edge: what lies below and to the left of it is beaten."""
    (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    x, y = map(list, zip(*(p.place for p in front), strict=True))
    # steps-pre: from each point down to the next one's AUROC, then right to it.
    axes.plot(
        [left, *x, x[-1]],
        [y[0], *y, bottom],
        drawstyle="steps-pre",
        color=INK,
        linewidth=1.1,
        linestyle=(0, (4, 2)),
        zorder=1.5,
    )
    axes.set(xlim=(left, None), ylim=(bottom, None))


def _explain(figure: Figure, others: bool) -> None:
    """What the marks mean, below the axes."""
    dot: dict[str, Any] = {"marker": "o", "linestyle": "", "color": MUTED}
    marks = [
        Line2D([], [], markersize=7, label="a method under its selection criterion", **dot),
        Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="Pareto front"),
    ]
    if others:
        marks.insert(1, Line2D([], [], markersize=2.5, label="under another score", **dot))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), handletextpad=0.4)


def _label(figure: Figure, axes: Axes, labelled: Sequence[Point], front: Sequence[Point]) -> None:
    """Every point's name in a column at the right, in the order of the points' heights."""
    figure.draw_without_rendering()  # fixes the layout, which the labels are fitted to
    inches = axes.get_window_extent().height / figure.dpi
    low, high = axes.get_ylim()
    ordered = sorted(labelled, key=lambda p: p.place[::-1], reverse=True)
    wanted = [(p.place[1] - low) / (high - low) for p in ordered]
    for point, height in zip(ordered, _spread(wanted, _PITCH / inches), strict=True):
        axes.annotate(
            f"{point.method} + {point.score}",
            point.place,
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            fontweight="bold" if point in front else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "relpos": (0, 0.5)},
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights near the `wanted` ones (from the top down), `gap` or more from each other, in [0, 1].

    Where they do not fit, they are spread evenly.
    """
    if (len(wanted) - 1) * gap > 1:
        return list(np.linspace(1, 0, len(wanted)))
    placed: list[float] = []
    for height in wanted:
        placed.append(min(height, placed[-1] - gap if placed else 1.0))
    lowest = 0.0
    for number in reversed(range(len(placed))):
        placed[number] = max(placed[number], lowest)
        lowest = placed[number] + gap
    return placed
