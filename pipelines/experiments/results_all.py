"""Every method by every score on PACS: the tables and the picture of docs/results_all.md.

From the runs of `conf/results_all.yaml`, with each method's default settings and with the sweep
of equal budgets: each method under its selection criterion in Zhu 2025's layout, then AUROC and
FPR of every score under every head, and accuracy against detection with the Pareto front.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.config import ConfigError, load
from pipelines.evaluate.metrics import MEAN, MetricRow, Metrics, Spread
from pipelines.experiments.result_runs import read_scores
from pipelines.plots import markdown_table, write_csv
from pipelines.report import page as report
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig

VARIANTS = {
    "none": "each method's default settings",
    "default": "equal budgets, on validation only",
}
COLUMNS = ("ID ACC", "OOD ACC", "AUROC", "FPR")


def run(folder: Path) -> str:
    """Write results_all_*.png and results_all.csv; return the tables as Markdown.

    Raises:
        ConfigError: where neither run is there.
    """
    parts, lines, missing = [], [], []
    for sweep, title in VARIANTS.items():
        words = ("preset=results_all", f"sweep={sweep}")
        opened = Run.open(load(PipelineConfig, "pipeline", words), Quiet())
        if not opened.has("evaluate"):
            missing.append(f"python -m jobs.pipeline {' '.join(words)}")
            continue
        metrics = opened.metrics
        parts += [f"### {title.capitalize()} (`sweep={sweep}`)", *tables(metrics)]
        lines += [(sweep, *row) for row in _csv_rows(metrics)]
        drawn = report.figures(metrics, read_scores(opened))
        (folder / f"results_all_{sweep}.png").write_bytes(drawn["accuracy_detection.png"])
    if not parts:
        raise ConfigError(["not in ./outputs yet; run first:", *missing])
    write_csv(
        folder / "results_all.csv",
        ["sweep", "method", "score", *(f"{c} {k}" for c in COLUMNS for k in ("mean", "std"))],
        lines,
    )
    return "\n\n".join([*parts, *(f"Not run yet: `{command}`" for command in missing)])


def tables(metrics: Metrics, *, over: str = "seeds") -> list[str]:
    """Three Markdown tables: each method under its selection criterion, AUROC of all, FPR of all.

    A method whose criterion is not in the run stands with its first score. `over` says in the
    note what the means are over.
    """
    scores = list(dict.fromkeys(row.score for row in metrics.rows))
    chosen = [metrics.criterion_row(method) for method in metrics.methods]
    first = [[r.method, r.score, *(_with_std(value) for value in figures(r))] for r in chosen]
    parts = [
        markdown_table(["method", "selection score", *COLUMNS], first),
        f"Percent, mean (std) over {len(metrics.seeds)} {over}; ID is positive, FPR at 95 % TPR.",
    ]
    found = {(row.method, row.score): row for row in metrics.rows}
    for column, title in ((2, "AUROC"), (3, "FPR at 95 % TPR")):
        cells = [
            [method, *(_cell(found.get((method, score)), column) for score in scores)]
            for method in metrics.methods
        ]
        parts += [f"{title} of every score under every head:"]
        parts += [markdown_table(["method", *(f"`{s}`" for s in scores)], cells)]
    return parts


def figures(row: MetricRow) -> list[Spread]:
    """Mean and std of each of `COLUMNS`, as fractions; the benchmark has shifted and OOD sets."""
    assert row.ood_accuracy is not None
    return [row.id_accuracy, row.ood_accuracy, row.auroc[MEAN], row.fpr[MEAN]]


def _with_std(value: Spread) -> str:
    return f"{100 * value.mean:.1f} ({100 * value.std:.1f})"


def _cell(row: MetricRow | None, column: int) -> str:
    return "-" if row is None else f"{100 * figures(row)[column].mean:.1f}"


def _csv_rows(metrics: Metrics) -> list[tuple[str | float, ...]]:
    return [
        (row.method, row.score, *(v for f in figures(row) for v in (f.mean, f.std)))
        for row in metrics.rows
    ]
