"""Speed as ratios of two things measured in one run: `suite=maths` prints a table."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from jobs import main
from pipelines import speed
from pipelines.config import Section
from pipelines.speed.measure import table, to_json


class BenchmarkConfig(Section):
    """What is measured."""

    suite: str = Field(description="maths, embed, prompts, ...: a module of pipelines/speed")
    scale: float = Field(1.0, gt=0, le=1, description="share of the full sizes, for small machines")
    only: str = Field("", description="a part of the suite, where it has parts: exact_metrics")
    json_file: str | None = Field(None, description="also write the rows here")


def benchmark(config: BenchmarkConfig) -> None:
    """Measure, print, and write."""
    rows = speed.run(config.suite, scale=config.scale, only=config.only)
    print(table(rows))
    if config.json_file:
        Path(config.json_file).write_text(to_json(rows) + "\n")


if __name__ == "__main__":
    main("benchmark", lambda: BenchmarkConfig, benchmark, __doc__)
