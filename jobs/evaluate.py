"""Only the stage evaluate: the table, the intervals and the report."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig


def evaluate(config: PipelineConfig) -> None:
    """Run the stage and say where its result lies."""
    done = run(config, Console(), only="evaluate")
    print(f"evaluate: {done.storage.path('runs', done.id, 'evaluate.json')}")


if __name__ == "__main__":
    main("evaluate", PipelineConfig, evaluate, __doc__ or "")
