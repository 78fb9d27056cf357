"""How far the (tau, c) that validation chose is from the best on the test images.

`sweep=delta_energy` on PACS, each domain held out in turn, for the zero-shot prompts and for the
head of `ebm`: the AUROC of every (tau, c) of the grid on the test sets, beside the one that the
sweep chose without seeing them. The whole test grid is computed here and nowhere else: no
setting, head or threshold depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import ConfigError, UserError, load
from pipelines.finetune.cache import load_predictor
from pipelines.ood import Interval, auroc, paired_delta_interval
from pipelines.plots import COLOURS, INK, label, markdown_table, panels, save, write_csv
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.score import search as posthoc
from pipelines.settings.config import PipelineConfig
from pipelines.sweep.surfaces import read_surfaces

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
# The step and weight that docs/training.md's sweep chose for ebm with every domain held out.
WORDS = (
    "sweep=delta_energy",
    "methods=[zero_shot,ebm]",
    "methods.ebm.training.lr=0.1",
    "methods.ebm.weight=2",
    "benchmark=pacs",
    "backbone=lit_effnet_lite0",
    "seeds=1",
)
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Grid:
    """One head's grid: the AUROC of each (tau, c) on validation and on test images."""

    domain: str
    method: str
    places: Sequence[tuple[float, int]]
    validation: Sequence[float]
    test: Sequence[float]
    chosen: tuple[float, int]
    lost: Interval

    def at(self, place: tuple[float, int]) -> float:
        """The test AUROC of a (tau, c)."""
        return self.test[self.places.index(place)]

    @property
    def best(self) -> tuple[float, int]:
        """The (tau, c) that the test images like best."""
        return self.places[int(np.argmax(self.test))]


def run(folder: Path) -> str:
    """Write delta_energy_choice.csv and .png; return the table as Markdown."""
    grids = [grid for domain in DOMAINS for grid in _grids(domain)]
    write_csv(
        folder / "delta_energy_choice.csv",
        ["held out", "method", "tau", "c", "validation AUROC", "test AUROC", "best test AUROC"],
        [
            (g.domain, g.method, *g.chosen, max(g.validation), g.at(g.chosen), max(g.test))
            for g in grids
        ],
    )
    _draw(grids, folder / "delta_energy_choice.png")
    rows = [
        [
            grid.domain,
            grid.method,
            _place(grid.chosen),
            f"{100 * max(grid.validation):.1f}",
            f"{100 * grid.at(grid.chosen):.2f}",
            _place(grid.best),
            f"{100 * max(grid.test):.2f}",
            _interval(grid.lost),
            f"{100 * (max(grid.test) - min(grid.test)):.1f}",
        ]
        for grid in grids
    ]
    return markdown_table(
        [
            "held out", "head", "chosen tau, c", "validation AUROC", "test AUROC of the choice",
            "best on test", "its test AUROC", "lost", "spread of the grid",
        ],
        rows,
    )  # fmt: skip


def _interval(lost: Interval) -> str:
    low, high = 100 * lost.low, 100 * lost.high
    return f"{100 * lost.value:.2f} [{low:.1f}, {high:.1f}]"


def _place(place: tuple[float, int]) -> str:
    return f"{place[0]:g}, {place[1]}"


def _grids(domain: str) -> list[Grid]:
    words = (*WORDS, f"benchmark.held_out={domain}")
    opened = Run.open(load(PipelineConfig, "pipeline", words), Quiet())
    if not opened.has("finetune"):
        command = " ".join(["python -m jobs.pipeline", *words])
        raise ConfigError(["not in ./outputs yet; run first:", command])
    surfaces = read_surfaces(opened.storage, opened.id)
    if surfaces is None:
        raise UserError(f"run {opened.id}: its sweep searched no score's parameters")
    return [_grid(opened, domain, method, surfaces) for method in opened.config.methods]


def _grid(opened: Run, domain: str, method: str, surfaces: pa.Table) -> Grid:
    """Validation figures from the sweep, test figures from the trained head."""
    rows = [
        row
        for row in surfaces.to_pylist()
        if (row["method"], row["score"]) == (method, "delta_energy")
    ]
    grid = [(row["tau"], int(row["c"])) for row in rows]
    chosen = opened.swept.methods[method].scores["delta_energy"]
    predictor = load_predictor(opened.storage, opened.finetuned.head(method).address)
    (ood,) = (opened.sets.load(name) for name in opened.sets.names("ood"))
    known = predictor.similarity(opened.sets.load("test").features)
    unknown = predictor.similarity(ood.features)
    config = opened.config.sweep.posthoc
    tested = posthoc.search("delta_energy", known, {"ood": unknown}, predictor.logit_scale, config)
    found = {(s.params["tau"], int(s.params["c"])): s.auroc for s in tested}
    choice, best = (chosen["tau"], int(chosen["c"])), max(found, key=lambda place: found[place])

    def sides(place: tuple[float, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        params = {"tau": place[0], "c": place[1]}
        first, second = (
            posthoc.scores_of("delta_energy", part, predictor.logit_scale, params)
            for part in (known, unknown)
        )
        return first, second

    return Grid(
        domain,
        method,
        grid,
        [row["auroc"] for row in rows],
        [found[place] for place in grid],
        choice,
        paired_delta_interval(auroc, sides(best), sides(choice), num_resamples=NUM_RESAMPLES),
    )


def _draw(grids: Sequence[Grid], path: Path) -> None:
    """One panel a domain: the AUROC of the head of `ebm` over tau, one line for each c."""
    shown = [grid for grid in grids if grid.method == "ebm"]
    figure, axes = panels(len(shown), width=3.0)
    for axis, grid in zip(axes, shown, strict=True):
        counts = sorted({c for _, c in grid.places})
        for c, colour in zip((counts[0], counts[-1]), COLOURS, strict=False):
            places = [n for n, (_, known) in enumerate(grid.places) if known == c]
            taus = [grid.places[n][0] for n in places]
            axis.plot(taus, [100 * grid.test[n] for n in places], color=colour, label=f"c = {c}")
            axis.plot(taus, [100 * grid.validation[n] for n in places], color=colour, linestyle=":")
        axis.plot(
            grid.chosen[0], 100 * grid.at(grid.chosen), "o", color=INK, label="chosen", zorder=5
        )
        axis.set(xscale="log")
        label(axis, title=f"{grid.domain} held out", x="temperature tau", y="AUROC, %")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)
