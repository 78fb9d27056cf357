"""The report's pictures, drawn from the scores tables; inline SVG for the page, PNG for docs.

Each panel is a figure of its own, so that a narrow window stacks them at a readable size. Only
`matplotlib.figure.Figure` is used: no pyplot, no backend or setting of the process is changed.
In SVG the ink and data colours become CSS variables, so that a page can restyle them when dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.ood import auroc
from pipelines.plots import (
    BLUE,
    BROWN,
    GREEN,
    INK,
    LINE,
    MUTED,
    OLIVE,
    ORANGE,
    PAPER,
    PINK,
    PURPLE,
    SHADE,
    SKY,
    VERMILION,
    new_figure,
)
from pipelines.records import SetName
from pipelines.report import tables

# Blues for the known classes, warm hues for the others.
_KINDS = {"ID": BLUE, "shifted": SKY, "near": ORANGE, "far": VERMILION}
_OTHER_GROUPS = (PINK, GREEN, BROWN, OLIVE)
_SCORES: dict[str, tuple[str, Any]] = {
    "delta_energy": (PURPLE, "-"),
    "mcm": (GREEN, "-"),
    "energy": (INK, "-"),
    "max_logit": (INK, (0, (4, 2))),
    "msp": (MUTED, (0, (1, 1.5))),
}
_OTHER_SCORES = (ORANGE, BLUE, VERMILION, SKY, OLIVE, BROWN)
_MINUS = "\u2212"  # as on the axes


@dataclass(frozen=True)
class ScoredMethod:
    """A method's scores of one seed, and its selection criterion with the threshold on it."""

    method: str
    score: str
    threshold: float
    table: pa.Table

    @cached_property
    def _members(self) -> tuple[list[str], NDArray[np.int64]]:
        """The names of the sets, and which of them each row is of."""
        names = pc.unique(self.table["set"])
        return names.to_pylist(), np.asarray(pc.index_in(self.table["set"], value_set=names))

    @property
    def row_kinds(self) -> NDArray[np.object_]:
        """The kind of set of each row."""
        names, members = self._members
        return np.array([kind(name) for name in names], dtype=object)[members]

    def values(self, name: str, score: str | None = None) -> NDArray[np.float64]:
        """The scores of one set, or of a kind (`ID`, `shifted`, or a group of OOD sets)."""
        names, members = self._members
        wanted = [i for i, item in enumerate(names) if name in (item, kind(item))]
        column = np.asarray(self.table[f"score_{score or self.score}"], dtype=np.float64)
        return column[np.isin(members, wanted)]

    @property
    def sets(self) -> list[str]:
        """The test sets that have scores: ID, shifted, OOD from near to far."""
        return sorted((name for name in self._members[0] if kind(name)), key=tables.set_rank)

    @property
    def kinds(self) -> list[str]:
        """The kinds of those sets, in order."""
        return list(dict.fromkeys(map(kind, self.sets)))

    @property
    def groups(self) -> list[str]:
        """The groups of OOD sets, from near to far."""
        return [name for name in self.kinds if name not in ("ID", "shifted")]

    @property
    def scores(self) -> list[str]:
        """The names of all scores of the table, in order."""
        names = self.table.column_names
        return [name.removeprefix("score_") for name in names if name.startswith("score_")]


def kind(set_name: str) -> str:
    """`ID`, `shifted` or the group of an OOD set; empty for a set that is not for testing."""
    parsed = SetName.parse(set_name)
    if parsed.role == "ood":
        return parsed.group
    return {"test": "ID", "shifted": "shifted"}.get(parsed.role, "")


def kind_colour(name: str) -> str:
    """The colour of a kind of set, the same in every picture."""
    return _KINDS.get(name) or _OTHER_GROUPS[sum(map(ord, name)) % len(_OTHER_GROUPS)]


def score_style(name: str, names: Sequence[str]) -> tuple[str, Any]:
    """Colour and dashes of a score, the same in every picture of a report."""
    if name in _SCORES:
        return _SCORES[name]
    others = [other for other in names if other not in _SCORES]
    return _OTHER_SCORES[others.index(name) % len(_OTHER_SCORES)], (0, (5, 1.5, 1, 1.5))


def histogram(scored: ScoredMethod) -> Figure:
    """The selection criterion on each kind of set, one row each, with the threshold through all."""
    kinds = scored.kinds
    with new_figure(4.4, 0.62 * len(kinds) + 0.75) as figure:
        _ridges(list(figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]), scored)
    return figure


def energy_change(scored: ScoredMethod) -> Figure | None:
    """`delta_energy` of every set: median, middle half and middle 90 % of the images."""
    if "delta_energy" not in scored.scores:
        return None
    with new_figure(4.4, 0.26 * len(scored.sets) + 0.8) as figure:
        axes = figure.subplots()
        for row, name in enumerate(scored.sets):
            low, first, middle, third, high = np.quantile(
                scored.values(name, "delta_energy"), [0.05, 0.25, 0.5, 0.75, 0.95]
            )
            colour = kind_colour(kind(name))
            axes.plot([low, high], [row, row], color=colour, linewidth=1.2)
            axes.plot([first, third], [row, row], color=colour, linewidth=5, alpha=0.75)
            axes.plot([middle], [row], "o", color=PAPER, markeredgecolor=colour, markersize=5)
        axes.set_yticks(range(len(scored.sets)), [tables.set_label(n) for n in scored.sets])
        axes.set_ylim(len(scored.sets) - 0.5, -0.5)
        axes.set_xlabel(f"energy change E1 {_MINUS} E0 (no unit)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def roc(scored: ScoredMethod, group: str, target_tpr: float) -> Figure:
    """ROC curves of every score for one group of OOD sets; the selection criterion is thick."""
    with new_figure(3.5, 3.2) as figure:
        axes = figure.subplots()
        for score in scored.scores:
            false, true, area = _curve(scored, group, score)
            colour, dashes = score_style(score, scored.scores)
            is_criterion = score == scored.score
            # The thick curve lies below, so that an equal one still shows.
            style: dict[str, Any] = (
                {"linewidth": 2.4, "zorder": 2} if is_criterion else {"linewidth": 1.2, "zorder": 3}
            )
            label = f"{score}  {100 * area:.1f}"
            axes.plot(false, true, color=colour, linestyle=dashes, label=label, **style)
        axes.axhline(100 * target_tpr, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set(xlim=(0, 100), ylim=(0, 100.5), xlabel="OOD accepted, FPR (%)")
        axes.set_ylabel("ID accepted, TPR (%)")
        axes.legend(loc="lower right", title="AUROC (%)", title_fontsize=8.5)
    return figure


def histograms(scored: Sequence[ScoredMethod]) -> Figure:
    """Every method under its selection criterion, side by side, for the README."""
    rows = max(len(item.kinds) for item in scored)
    with new_figure(3.6 * len(scored), 0.62 * rows + 1.0) as figure:
        for column, item in zip(
            figure.subfigures(1, len(scored), squeeze=False)[0], scored, strict=True
        ):
            column.suptitle(f"{item.method} + {item.score}", fontsize=10, fontweight="bold")
            _ridges(
                list(column.subplots(len(item.kinds), 1, sharex=True, squeeze=False)[:, 0]), item
            )
    return figure


def table_picture(shown: tables.Table) -> Figure:
    """The main table as a picture, for the README; marked rows are shaded."""
    pitch, heads = 0.27, 2
    lines = heads + len(shown.rows) + len(shown.methods)
    stub, width = 1.7, 1.0
    total = stub + width * len(shown.columns)
    with new_figure(total, pitch * lines + 0.15, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, total), ylim=(lines + 0.3, -0.3))
        axes.axis("off")
        rights = [stub + width * (i + 1) - 0.1 for i in range(len(shown.columns))]
        _picture_heads(axes, shown, rights, width)
        line = heads
        for method, rows in shown.methods:
            axes.axhline(line, color=LINE, linewidth=0.8)
            axes.text(0.1, line + 0.5, method, va="center", fontweight="bold")
            for row in rows:
                line += 1
                if row.label:
                    axes.axhspan(line, line + 1, color=SHADE, zorder=0)
                axes.text(0.25, line + 0.5, row.score, va="center")
                for right, value in zip(rights, row.values, strict=True):
                    text = "-" if value is None else str(value)
                    axes.text(right, line + 0.5, text, va="center", ha="right")
            line += 1
    return figure


def _ridges(rows: Sequence[Axes], scored: ScoredMethod) -> None:
    """A histogram per kind on a common axis, labelled at its left and with the share accepted."""
    values = {name: scored.values(name) for name in scored.kinds}
    low, high = np.quantile(np.concatenate(list(values.values())), [0.001, 0.999])
    pad = 0.02 * (high - low) or 1e-6
    edges = np.linspace(min(low, scored.threshold) - pad, max(high, scored.threshold) + pad, 46)
    for axes, (name, scores) in zip(rows, values.items(), strict=True):
        counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
        axes.stairs(counts / counts.max(), edges, fill=True, color=kind_colour(name), alpha=0.85)
        axes.axvline(scored.threshold, color=INK, linewidth=1)
        accepted = 100 * np.mean(scores >= scored.threshold)
        side: dict[str, Any] = {"va": "center", "transform": axes.transAxes, "fontsize": 9}
        axes.text(-0.02, 0.35, name, ha="right", **side)
        axes.text(1.02, 0.35, f"{accepted:.1f} %", ha="left", **side)
        axes.set(yticks=[], ylim=(0, 1.05), xlim=(edges[0], edges[-1]))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="x", length=3 if axes is rows[-1] else 0)
    rows[0].set_title("accepted", fontsize=8.5, color=MUTED, loc="right", x=1.16)
    rows[-1].locator_params(axis="x", nbins=5)
    rows[-1].set_xlabel(f"{scored.score} (threshold {_minus(scored.threshold)})")


def _minus(value: float) -> str:
    """A number with the sign that the axes have."""
    return f"{value:.4g}".replace("-", _MINUS)


def _curve(
    scored: ScoredMethod, group: str, score: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """FPR and TPR in percent at no more than some 200 thresholds, and the exact AUROC."""
    known, unknown = np.sort(scored.values("ID", score)), np.sort(scored.values(group, score))
    both = np.sort(np.concatenate([known, unknown]))
    steps = np.linspace(0, len(both) - 1, 200).astype(np.int64)
    thresholds = np.append(np.unique(both[steps]), np.inf)
    true, false = (
        100 * (1 - np.searchsorted(side, thresholds) / len(side)) for side in (known, unknown)
    )
    return false, true, auroc(known, unknown)


def _picture_heads(axes: Axes, shown: tables.Table, rights: Sequence[float], width: float) -> None:
    at = 0
    for head, count in shown.heads:
        left, right = rights[at] - width + 0.25, rights[at + count - 1]
        if head:
            axes.text((left + right) / 2, 0.5, head, ha="center", va="center", fontweight="bold")
            axes.plot([left, right], [1, 1], color=LINE, linewidth=0.8)
        at += count
    for right, column in zip(rights, shown.columns, strict=True):
        axes.text(right, 1.5, column.name, ha="right", va="center", color=INK)
