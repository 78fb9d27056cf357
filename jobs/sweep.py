"""Only the stage sweep: choose settings on validation data, from the features that embed wrote."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.run import PipelineConfig


def sweep(config: PipelineConfig) -> None:
    """Run the stage and say where its result lies."""
    done = run(config, Console(), only="sweep")
    print(f"sweep: {done.storage.path('runs', done.id, 'sweep.json')}")


if __name__ == "__main__":
    main("sweep", PipelineConfig, sweep, __doc__ or "")
