"""Only the stage score: every head judges every image by every score."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig


def score(config: PipelineConfig) -> None:
    """Run the stage and say where its result lies."""
    done = run(config, Console(), only="score")
    print(f"score: {done.storage.path('runs', done.id, 'score.json')}")


if __name__ == "__main__":
    main("score", PipelineConfig, score, __doc__ or "")
