"""Only the stage finetune: train the chosen settings with Ray Train."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig


def finetune(config: PipelineConfig) -> None:
    """Run the stage and say where its result lies."""
    done = run(config, Console(), only="finetune")
    print(f"finetune: {done.storage.path('runs', done.id, 'finetune.json')}")


if __name__ == "__main__":
    main("finetune", PipelineConfig, finetune, __doc__ or "")
