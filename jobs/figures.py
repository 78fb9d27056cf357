"""Numerical experiments and pictures of the docs: `figure=theorem_3_5` and the like."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from jobs import main
from pipelines import experiments as figures
from pipelines.config import Section


class FiguresConfig(Section):
    """Which experiment, and where its pictures go."""

    figure: str = Field(description="a module of pipelines/experiments")
    folder: str = Field("docs/figures", description="where PNG and CSV files are written")


def draw(config: FiguresConfig) -> None:
    """Run the experiment, write its files, print its summary."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(figures.run(config.figure, folder))


if __name__ == "__main__":
    main("figures", lambda: FiguresConfig, draw, __doc__)
