"""Figures of trials over two numeric settings: the two that matter most, and the two margins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.plots import PAPER, new_figure
from pipelines.sweep.axes import Scale
from pipelines.sweep.importance import Importance, is_number, varied
from pipelines.sweep.marks import (
    AUROC,
    FPR,
    colour_bar,
    colour_map,
    colour_of,
    frame,
    judged,
    ring,
    span,
)
from pipelines.sweep.result import Settings, Trial

MARGINS = ("m_in", "m_out")
_PLACES = 6  # of trials that a plane needs


def contour(
    trials: Sequence[Trial],
    criterion: str,
    chosen: Settings,
    measured: Importance | None = None,
) -> Figure | None:
    """Validation AUROC over the two numeric settings that matter most, linear between trials.

    Where other settings vary too, the best trial of a place stands for it.
    """
    known = judged(trials, criterion)
    shares = measured.shares if measured is not None else {}
    keys = [
        key
        for key in sorted(varied(trials), key=lambda key: -shares.get(key, 0.0))
        if all(is_number(trial.settings.get(key)) for trial, _ in known)
    ][:2]
    if len(keys) < 2:
        return None
    plane = _Plane.of(keys, known)
    if not plane.is_spanned:
        return None
    with new_figure(4.6, 3.4) as figure:
        _draw_plane(figure, figure.subplots(), plane, chosen, AUROC)
    return figure


def margin_map(trials: Sequence[Trial], criterion: str, chosen: Settings) -> Figure | None:
    """Validation AUROC and FPR over m_in and m_out (Liu 2020, figure 4b), the choice ringed.

    Where other settings vary too, the best trial of a place stands for it.
    """
    known = [
        (trial, auroc, figures.fpr)
        for trial, auroc in judged(trials, criterion)
        if (figures := trial.by(criterion)) is not None
        and all(is_number(trial.settings.get(key)) for key in MARGINS)
    ]
    if not set(MARGINS) <= set(varied([trial for trial, *_ in known])):
        return None
    by_fpr = sorted(known, key=lambda item: -item[2])
    planes = {
        AUROC: _Plane.of(MARGINS, [(trial, auroc) for trial, auroc, _ in known]),
        FPR: _Plane.of(MARGINS, [(trial, fpr) for trial, _, fpr in by_fpr]),
    }
    if not planes[AUROC].is_spanned:
        return None
    with new_figure(8.6, 3.4) as figure:
        for axes, (of, plane) in zip(figure.subplots(1, 2), planes.items(), strict=True):
            _draw_plane(figure, axes, plane, chosen, of)
    return figure


@dataclass(frozen=True)
class _Plane:
    """A figure of trials over two numeric settings.

    Attributes:
        scales: of the two settings.
        places: (P, 2) in [0, 1].
        values: (P,) in percent.
    """

    scales: list[Scale]
    places: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, keys: Sequence[str], known: Sequence[tuple[Trial, float]]) -> _Plane:
        """Of trials and their figures, the best last, so that it stands for its place."""
        scales = [Scale.of(key, [trial.settings[key] for trial, _ in known]) for key in keys]
        best = {
            tuple(s.place(trial.settings[k]) for s, k in zip(scales, keys, strict=True)): value
            for trial, value in known
        }
        return cls(scales, np.array(list(best)), 100 * np.array(list(best.values())))

    @property
    def is_spanned(self) -> bool:
        """Whether there are enough places, and not all of them on a line."""
        centred = self.places - self.places.mean(axis=0)
        return len(self.places) >= _PLACES and int(np.linalg.matrix_rank(centred)) == 2


def _draw_plane(figure: Figure, axes: Axes, plane: _Plane, chosen: Settings, of: str) -> None:
    """The figure as colours between the places, linear between them."""
    colours = colour_map((plane.values / 100).tolist())
    levels = np.linspace(*span(plane.values), 13)
    axes.tricontourf(*plane.places.T, plane.values, levels, cmap=colours.cmap, norm=colours.norm)
    dot: dict[str, Any] = {"markeredgecolor": PAPER, "markeredgewidth": 0.8, "clip_on": False}
    for place, value in zip(plane.places, plane.values, strict=True):
        axes.plot(*place, "o", markersize=6, color=colour_of(colours, value), **dot)
    if all(scale.name in chosen for scale in plane.scales):
        ring(axes, *(scale.place(chosen[scale.name]) for scale in plane.scales))
    frame(axes, plane.scales)
    colour_bar(figure, axes, colours, of)
