"""The stages up to sweep: embed what is missing, then choose settings on validation data."""

from __future__ import annotations

import rich.console

from jobs import main
from jobs.console import Console
from pipelines.pipeline import run
from pipelines.settings import PipelineConfig
from pipelines.sweep import text as sweep_text
from pipelines.sweep.result import SweepResult

# Columns where the output is no terminal.
_WIDTH = 110


def sweep(config: PipelineConfig) -> None:
    """Run the stages, then print what was chosen and where the evidence lies."""
    done = run(config, Console(), last="sweep")
    place = ("runs", done.id, "sweep.json")
    result = SweepResult.from_json(done.storage.read_bytes(*place), done.storage.path(*place))
    terminal = rich.console.Console(highlight=False)
    if not terminal.is_terminal:
        terminal.width = _WIDTH
    print()
    terminal.print(sweep_text.summary(result))
    print(f"\nsweep      {done.storage.path(*place)}")
    print("next       python -m jobs.pipeline with the same words: train, judge, report, register")


if __name__ == "__main__":
    main("sweep", PipelineConfig, sweep, __doc__ or "")
