"""Only the stage register: put the chosen model and its threshold into the registry."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig


def register(config: PipelineConfig) -> None:
    """Run the stage and say where its result lies."""
    done = run(config, Console(), only="register")
    print(f"register: {done.storage.path('runs', done.id, 'register.json')}")


if __name__ == "__main__":
    main("register", PipelineConfig, register, __doc__ or "")
