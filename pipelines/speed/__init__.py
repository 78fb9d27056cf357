"""What the project measures of itself: each suite compares with a reference in the same run.

A module NAME.py here with `run(*, scale) -> rows` is a suite, `jobs.benchmark suite=NAME`.
"""

from __future__ import annotations

import importlib
import pkgutil

from pipelines.config import UserError
from pipelines.speed.measure import Row


def suites() -> list[str]:
    """The names of the suites."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in found if name != "measure"]


def run(suite: str, *, scale: float = 1.0, only: str = "") -> list[Row]:
    """Run a suite.

    Args:
        suite: its name.
        scale: share of the full sizes, in (0, 1].
        only: a part of the suite, where it has parts.

    Raises:
        UserError: for an unknown name.
    """
    if suite not in suites():
        raise UserError(f"suite={suite}: no such suite; allowed: {', '.join(suites())}")
    parts = {"only": only} if only else {}
    rows: list[Row] = importlib.import_module(f"{__name__}.{suite}").run(scale=scale, **parts)
    return rows
