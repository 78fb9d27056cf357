"""What fine-tuning gained on PACS (one domain left out at a time) and on the digits.

From the runs of `conf/results_pacs.yaml` (four) and `conf/results_digits.yaml`: every method by
every score in Zhu 2025's layout, what training gained over zero-shot under the same score, what
the score of the method's paper gained over MCM under the same head, and Zhu 2025's claim (EBM +
DeltaEnergy against CoOp + MCM), each difference with its paired 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from pipelines.evaluate.metrics import DifferenceMetric
from pipelines.experiments.result_runs import (
    COLUMNS,
    ResultRun,
    Row,
    accuracy_gain,
    detection_gain,
    open_runs,
    rows,
)
from pipelines.ood import Interval
from pipelines.plots import COLOURS, INK, label, markdown_table, panels, save, write_csv
from pipelines.records import Role

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
PACS = [("preset=results_pacs", f"benchmark.held_out={domain}") for domain in DOMAINS]
DIGITS = [("preset=results_digits",)]
# The score that each method's paper judges it by.
CRITERIA = {
    "linear_probe": "max_logit",
    "coop": "mcm",
    "ebm": "delta_energy",
    "energy_margin": "energy",
    "outlier_exposure": "msp",
    "balanced_energy": "energy",
}
METRICS: tuple[DifferenceMetric, ...] = ("auroc", "fpr")


def run(folder: Path) -> str:
    """Write training_results.csv and .png; return the tables as Markdown."""
    parts, found = [], []
    for title, words in (("PACS", PACS), ("Digits", DIGITS)):
        runs, missing = open_runs(words)
        found.append((title, runs, rows(runs)))
        parts += _section(title, runs, found[-1][2])
        parts += [f"Not run yet, so not in the means: `{command}`" for command in missing]
    write_csv(
        folder / "training_results.csv",
        ["benchmark", "method", "score", *(f"{c} {k}" for c in COLUMNS for k in ("mean", "std"))],
        [
            (title, r.method, r.score, *(v for c in COLUMNS for v in r.figures[c]))
            for title, _, table in found
            for r in table
        ],
    )
    _draw([(title, table) for title, _, table in found], folder / "training_results.png")
    return "\n\n".join(parts)


def _section(title: str, runs: Sequence[ResultRun], table: Sequence[Row]) -> list[str]:
    methods = [method for method in CRITERIA if any(r.method == method for r in table)]
    parts = [
        f"### {title}",
        f"Means over {len(runs)} runs: {', '.join(run.name for run in runs)}.",
        markdown_table(["method", "score", *COLUMNS], [_cells(r) for r in table]),
        f"Percent, mean (std) over {len(runs[0].metrics.seeds)} seeds; ID is positive, FPR at "
        f"95 % TPR. {runs[0].metrics.facts.notes}",
        "Gains over zero-shot, in points with 95 % paired intervals (the same score, MCM, on both "
        "sides of the detection columns):",
        markdown_table(
            ["method", "ID ACC", "OOD ACC", "AUROC (MCM)", "FPR (MCM)"],
            [_gain_row(runs, method) for method in methods],
        ),
        "What the score of the method's paper gains over MCM under the same head:",
        markdown_table(
            ["method", "score of its paper", "AUROC", "FPR"],
            [_score_row(runs, method) for method in methods if CRITERIA[method] != "mcm"],
        ),
        _claim(runs),
    ]
    if len(runs) > 1:
        parts += _by_run(runs)
    return parts


def _cells(row: Row) -> list[str]:
    numbers = [row.figures[column] for column in COLUMNS]
    return [row.method, row.score, *(f"{100 * m:.1f} ({100 * s:.1f})" for m, s in numbers)]


def _gain_row(runs: Sequence[ResultRun], method: str) -> list[str]:
    roles: tuple[Role, ...] = ("test", "shifted")
    gains = [accuracy_gain(runs, method, "zero_shot", role) for role in roles]
    start, end = ("zero_shot", "mcm"), (method, "mcm")
    gains += [detection_gain(runs, end, start, metric) for metric in METRICS]
    return [method, *map(_points, gains)]


def _score_row(runs: Sequence[ResultRun], method: str) -> list[str]:
    start, end = (method, "mcm"), (method, CRITERIA[method])
    gains = [detection_gain(runs, end, start, metric) for metric in METRICS]
    return [method, CRITERIA[method], *map(_points, gains)]


def _claim(runs: Sequence[ResultRun]) -> str:
    start, turn, end = ("coop", "mcm"), ("ebm", "mcm"), ("ebm", "delta_energy")
    steps = {"training (MCM kept)": (turn, start), "the score (EBM kept)": (end, turn)}
    steps["both: Zhu 2025's claim"] = (end, start)
    table = [
        [name, *(_points(detection_gain(runs, *pair, metric)) for metric in METRICS)]
        for name, pair in steps.items()
    ]
    probe = accuracy_gain(runs, "coop", "linear_probe", "test")
    return "\n\n".join(
        [
            "From CoOp + MCM to EBM + DeltaEnergy:",
            markdown_table(["step", "AUROC", "FPR"], table),
            f"CoOp's ID ACC minus the linear probe's: {_points(probe)}.",
        ]
    )


def _by_run(runs: Sequence[ResultRun]) -> list[str]:
    lines = []
    for run in runs:
        start, end = ("coop", "mcm"), ("ebm", "delta_energy")
        gains = [detection_gain([run], end, start, metric) for metric in METRICS]
        table = {(r.method, r.score): r for r in rows([run])}
        figures = [_cells(table[place])[2:] for place in (start, end)]
        lines.append([run.name, *(" / ".join(f) for f in figures), *map(_points, gains)])
    head = ["run", "CoOp + MCM", "EBM + DeltaEnergy", "AUROC gained", "FPR gained"]
    return ["By held-out domain (ID ACC / OOD ACC / AUROC / FPR):", markdown_table(head, lines)]


def _points(gain: Interval) -> str:
    mark = "" if gain.is_clear else " (overlaps 0)"
    return f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]{mark}"


def _draw(tables: Sequence[tuple[str, Sequence[Row]]], path: Path) -> None:
    figure, axes = panels(2 * len(tables), width=4.4, height=3.8)
    for number, (title, table) in enumerate(tables):
        _draw_accuracies(axes[2 * number], title, table)
        _draw_grid(axes[2 * number + 1], title, table)
    save(figure, path)


def _draw_accuracies(panel: Axes, title: str, table: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(row.method for row in table))
    by_method = {row.method: row for row in table}
    for shift, column, colour in zip((-0.17, 0.17), COLUMNS, COLOURS, strict=False):
        numbers = [by_method[method].figures[column] for method in methods]
        panel.barh(
            np.arange(len(methods)) + shift,
            [100 * mean for mean, _ in numbers],
            height=0.32,
            xerr=[100 * std for _, std in numbers],
            color=colour,
            label=column,
        )
    panel.set_yticks(range(len(methods)), methods)
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    label(panel, title=f"{title}: accuracy", x="percent (std over seeds)", y="")
    # Below the axis: bars may be anywhere within it.
    panel.legend(
        frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2
    )


def _draw_grid(panel: Axes, title: str, table: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(row.method for row in table))
    scores = list(dict.fromkeys(row.score for row in table))
    found = {(row.method, row.score): 100 * row.figures["AUROC"][0] for row in table}
    # A head that a score cannot judge has an empty place.
    grid = np.array([[found.get((method, s), np.nan) for s in scores] for method in methods])
    lowest = float(np.nanmin(grid))
    panel.imshow(grid, cmap="Blues", aspect="auto", vmin=lowest - 5, vmax=100)
    for (i, j), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        colour = "white" if value > (lowest + 100) / 2 else INK
        panel.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=colour)
    panel.set_xticks(range(len(scores)), scores, rotation=45, ha="right")
    panel.set_yticks(range(len(methods)), methods)
    label(panel, title=f"{title}: AUROC", x="", y="")
