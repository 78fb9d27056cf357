"""What several pictures of a sweep share: whose figures are drawn, in which colours, and marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.plots import INK
from pipelines.sweep.axes import Scale
from pipelines.sweep.result import Trial

# What is drawn of trials and of scores' settings.
AUROC, FPR = "AUROC", "FPR"


def judged(trials: Sequence[Trial], criterion: str) -> list[tuple[Trial, float]]:
    """The trials that have both figures, with their AUROC, the best last."""
    known = [
        (trial, figures.auroc)
        for trial in trials
        if trial.status != "failed"
        and trial.accuracy is not None
        and (figures := trial.by(criterion)) is not None
    ]
    return sorted(known, key=lambda item: item[1])


def span(percents: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """The least and the largest value, apart from each other."""
    low, high = float(np.min(percents)), float(np.max(percents))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def colour_map(aurocs: Sequence[float]) -> ScalarMappable:
    """Percent to colour, dark blue to yellow-green, without the ends that a page swallows."""
    steps = mpl.colormaps["viridis"](np.linspace(0.08, 0.9, 24))
    return ScalarMappable(Normalize(*span([100 * a for a in aurocs])), ListedColormap(steps))


def colour_of(colours: ScalarMappable, percent: float) -> tuple[float, ...]:
    """The colour of a value in percent."""
    return tuple(colours.to_rgba(np.array([percent]))[0])


def colour_bar(figure: Figure, axes: Axes, colours: ScalarMappable, of: str = AUROC) -> None:
    """The scale of the colours beside the axes."""
    bar = figure.colorbar(colours, ax=axes, pad=0.03, fraction=0.05)
    bar.set_label(f"validation {of} (%)", color=INK)
    bar.outline.set_visible(False)


def frame(axes: Axes, scales: Sequence[Scale]) -> None:
    """The scales' own values along the sides of a square from 0 to 1."""
    for side, scale in zip("xy", scales, strict=True):
        places, texts = zip(*scale.ticks, strict=True)
        axes.set(**{f"{side}ticks": places, f"{side}ticklabels": texts, f"{side}label": scale.name})
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))


def ring(axes: Axes, x: float, y: float) -> None:
    """A ring around what was chosen."""
    style: dict[str, Any] = {"fillstyle": "none", "color": INK, "clip_on": False, "zorder": 5}
    axes.plot([x], [y], "o", markersize=13, markeredgewidth=1.6, **style)
