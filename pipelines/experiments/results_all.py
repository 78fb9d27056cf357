"""Every method by every score on PACS: the tables and the picture of docs/results_all.md.

From the runs of `conf/results_all.yaml`, with each method's own settings and with the sweep of
equal budgets: each method under its own score in Zhu 2025's layout, then AUROC and FPR of every
score under every head, and accuracy against detection with the Pareto front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import UserError, load
from pipelines.plots import markdown_table, write_csv
from pipelines.report import page as report
from pipelines.run import Quiet, Run
from pipelines.score import stage as score
from pipelines.score.result import ScoreResult
from pipelines.settings import PipelineConfig

VARIANTS = {"none": "each method's own settings", "default": "equal budgets, on validation only"}
COLUMNS = ("ID ACC", "OOD ACC", "AUROC", "FPR")


def run(folder: Path) -> str:
    """Write results_all_*.png and results_all.csv; return the tables as Markdown.

    Raises:
        UserError: where neither run is there.
    """
    parts, lines, missing = [], [], []
    for sweep, title in VARIANTS.items():
        words = ("preset=results_all", f"sweep={sweep}")
        opened = Run.open(load(PipelineConfig, "pipeline", words), Quiet())
        if not opened.has("evaluate"):
            missing.append(f"python -m jobs.pipeline {' '.join(words)}")
            continue
        metrics = opened.storage.read_json("runs", opened.id, "metrics.json")
        methods = {name: m.score for name, m in opened.config.methods.items()}
        parts += [f"### {title.capitalize()} (`sweep={sweep}`)", *tables(metrics, methods)]
        lines += [(sweep, *row) for row in _csv_rows(metrics)]
        (folder / f"results_all_{sweep}.png").write_bytes(_picture(opened, metrics))
    if not parts:
        raise UserError("\n".join(["not in ./outputs yet; run first:", *missing]))
    write_csv(
        folder / "results_all.csv",
        ["sweep", "method", "score", *(f"{c} {k}" for c in COLUMNS for k in ("mean", "std"))],
        lines,
    )
    return "\n\n".join([*parts, *(f"Not run yet: `{command}`" for command in missing)])


def tables(metrics: Mapping[str, Any], methods: Mapping[str, str]) -> list[str]:
    """Three Markdown tables: own scores, AUROC of all, FPR of all.

    Args:
        metrics: `metrics.json`.
        methods: each method's own score.
    """
    found = {(row["method"], row["score"]): row for row in metrics["rows"]}
    names = list(dict.fromkeys(name for name, _ in found))
    scores = list(dict.fromkeys(name for _, name in found))
    # A method whose own score is fitted, and not in this run, stands with the first one.
    own = {n: methods[n] if (n, methods[n]) in found else scores[0] for n in names}
    first = [
        [name, own[name], *(_with_std(value) for value in figures(found[name, own[name]]))]
        for name in names
    ]
    parts = [
        markdown_table(["method", "own score", *COLUMNS], first),
        f"Percent, mean (std) over {len(metrics['seeds'])} seeds; ID is positive, FPR at 95 % TPR.",
    ]
    for column, title in ((2, "AUROC"), (3, "FPR at 95 % TPR")):
        cells = [[name, *(_cell(found.get((name, s)), column) for s in scores)] for name in names]
        parts += [f"{title} of every score under every head:"]
        parts += [markdown_table(["method", *(f"`{s}`" for s in scores)], cells)]
    return parts


def figures(row: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """Mean and std of each of `COLUMNS`, as fractions."""
    return [row["id_accuracy"], row["ood_accuracy"], row["auroc"]["mean"], row["fpr"]["mean"]]


def _with_std(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ({100 * (value['std'] or 0.0):.1f})"


def _cell(row: Mapping[str, Any] | None, column: int) -> str:
    return "-" if row is None else f"{100 * figures(row)[column]['mean']:.1f}"


def _csv_rows(metrics: Mapping[str, Any]) -> Sequence[tuple[Any, ...]]:
    return [
        (row["method"], row["score"], *(v for f in figures(row) for v in (f["mean"], f["std"])))
        for row in metrics["rows"]
    ]


def _picture(opened: Run, metrics: Mapping[str, Any]) -> bytes:
    judged = score.read_chosen(opened.storage, ScoreResult.model_validate(opened.manifest("score")))
    drawn = report.figures(metrics, judged, sweep=opened.manifest("sweep"))
    return drawn["accuracy_detection.png"]
