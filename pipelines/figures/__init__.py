"""Experiments and pictures behind the docs, one file each: `jobs.figures figure=NAME`.

A module NAME.py here with `run(out_dir) -> Markdown summary` is a figure; it writes its PNG and
CSV files into `out_dir`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pipelines.config import UserError


def names() -> list[str]:
    """The figures there are."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def run(figure: str, out_dir: Path) -> str:
    """Make a figure.

    Raises:
        UserError: for an unknown name.
    """
    if figure not in names():
        raise UserError(f"figure={figure}: no such figure; allowed: {', '.join(names())}")
    summary: str = importlib.import_module(f"{__name__}.{figure}").run(out_dir)
    return summary
