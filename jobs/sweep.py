"""The stages up to sweep: embed what is missing, then choose settings on validation data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import main, run_section

if TYPE_CHECKING:
    from pipelines.settings.config import PipelineConfig


def sweep(config: PipelineConfig) -> None:
    """Run the stages, then print what was chosen and where the evidence lies."""
    from jobs.console import Console, show
    from pipelines.pipeline import run
    from pipelines.sweep import text as sweep_text

    with Console() as console:
        done = run(config, console, last="sweep")
    print()
    show(sweep_text.summary(done.swept))
    print(f"\nsweep      {done.storage.path(*done.place('sweep'))}")
    print("next       python -m jobs.pipeline with the same words: train, judge, report, register")


if __name__ == "__main__":
    main("sweep", run_section, sweep, __doc__)
