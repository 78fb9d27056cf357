"""Compare two recordings: python -m tests.golden.compare A.json B.json [--tolerance exact]

Each number that moved beyond the tolerance is a line; the exit status is then 1.

exact    the recorded ten digits: one machine, one set of libraries (training is deterministic).
machine  another machine or other libraries, whose matrix products round differently: one epoch
         to a relative 1e-3; shares of a run (accuracy, AUROC, FPR) to 0.01, which is an image or
         two of a set; thresholds to a relative 1e-2; the score's parameters exactly, because
         they come from a grid.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tests.golden.recording import Recording

SHARES = ("id_accuracy", "ood_accuracy", "auroc/", "fpr/")
Near: TypeAlias = Callable[[str, float, float], bool]  # (column, a, b)


@dataclass(frozen=True)
class Moved:
    """A number that differs; None where a recording lacks it."""

    row: str
    column: str
    a: float | None
    b: float | None

    def __str__(self) -> str:
        """A line of the command's output."""
        if self.a is None or self.b is None:
            return f"{self.row}: {self.column} {_shown(self.a)} -> {_shown(self.b)}"
        change = self.b - self.a
        return f"{self.row}: {self.column} {self.a:.10g} -> {self.b:.10g} ({change:+.3g})"


def exact(column: str, a: float, b: float) -> bool:
    """To the recorded digits."""
    return a == b or (math.isnan(a) and math.isnan(b))


def machine(column: str, a: float, b: float) -> bool:
    """To what another machine's rounding may move."""
    if exact(column, a, b):
        return True
    if column.startswith(SHARES):
        return abs(a - b) <= 0.01
    if column.startswith("params/"):
        return False
    if column == "threshold":
        return math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-4)
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5)


TOLERANCES: dict[str, Near] = {"exact": exact, "machine": machine}


def compare(a: Recording, b: Recording, near: Near = exact) -> list[Moved]:
    """Every number that moved, appeared or went."""
    return list(_moved(a.rounded(), b.rounded(), near))


def _moved(a: Recording, b: Recording, near: Near) -> Iterator[Moved]:
    for row in sorted({*a.table, *b.table}):
        first, second = a.table.get(row, {}), b.table.get(row, {})
        for column in sorted({*first, *second}):
            x, y = first.get(column), second.get(column)
            if x is None or y is None or not near(column, x, y):
                yield Moved(row, column, x, y)


def report(a: Recording, b: Recording, near: Near) -> bool:
    """Print what moved; whether anything did."""
    moved = compare(a, b, near)
    for line in moved:
        print(line)
    total = sum(len(row) for row in a.table.values())
    print(f"{a.name}: {len(moved)} of {total} numbers moved")
    return bool(moved)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.10g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--tolerance", choices=TOLERANCES, default="exact")
    given = parser.parse_args()
    a, b = Recording.read(given.a), Recording.read(given.b)
    sys.exit(report(a, b, TOLERANCES[given.tolerance]))


if __name__ == "__main__":
    main()
