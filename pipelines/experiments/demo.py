"""The README's pictures and table, from the run that `make demo` left in ./outputs."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import UserError, load
from pipelines.report import page as report
from pipelines.run import Quiet, Run
from pipelines.score import stage as score
from pipelines.score.result import ScoreResult
from pipelines.settings import PipelineConfig


def run(out_dir: Path) -> str:
    """Write demo_*.png and return the table as Markdown.

    Raises:
        UserError: where the demo has not run yet.
    """
    found = Run.open(load(PipelineConfig, "pipeline"), Quiet())
    if not found.has("evaluate"):
        raise UserError("the demo has not run in ./outputs yet: run make demo first")
    metrics = found.storage.read_json("runs", found.id, "metrics.json")
    tables = score.read_chosen(found.storage, ScoreResult.model_validate(found.manifest("score")))
    pictures = report.figures(metrics, tables, sweep=found.manifest("sweep"))
    for name, content in pictures.items():
        (out_dir / f"demo_{name}").write_bytes(content)
    return report.markdown_table(metrics)
