"""The stages up to sweep: embed what is missing, then choose settings on validation data."""

from __future__ import annotations

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig
from pipelines.sweep import text as sweep_text


def sweep(config: PipelineConfig) -> None:
    """Run the stages, then print what was chosen and where the evidence lies."""
    done = run(config, Console(), last="sweep")
    print("\n" + sweep_text.summary(done.manifest("sweep")))
    print(f"\nsweep      {done.storage.path('runs', done.id, 'sweep.json')}")
    print("next       python -m jobs.pipeline with the same words: train, judge, report, register")


if __name__ == "__main__":
    main("sweep", PipelineConfig, sweep, __doc__ or "")
