"""The README's pictures and table, from the run that `make demo` left in ./outputs."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import UserError, load
from pipelines.experiments.result_runs import read_scores
from pipelines.report.page import figures
from pipelines.report.text import markdown_table
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig

# What `make demo` gives jobs.pipeline.
WORDS = ("preset=demo",)


def run(out_dir: Path) -> str:
    """Write demo_*.png and return the table as Markdown.

    Raises:
        UserError: where the demo has not run yet.
    """
    found = Run.open(load(PipelineConfig, "pipeline", WORDS), Quiet())
    if not found.has("evaluate"):
        raise UserError("the demo has not run in ./outputs yet: run make demo first")
    metrics = found.metrics
    for name, content in figures(metrics, read_scores(found)).items():
        (out_dir / f"demo_{name}").write_bytes(content)
    return markdown_table(metrics)
