"""A recording: a table of numbers, one row a method (and score), kept as small JSON.

    {"name": "demo", "rows": {
    "ebm + energy": {"auroc/near": 0.956, "id_accuracy": 0.993072, ...}, ...}}

Numbers are kept to ten digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

FOLDER = Path(__file__).parent
DIGITS = 10

Table: TypeAlias = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Recording:
    """Numbers by row and column."""

    name: str
    table: Table

    @classmethod
    def read(cls, path: Path) -> Recording:
        """The recording in a file that `write` wrote."""
        content = json.loads(path.read_text())
        return cls(content["name"], content["rows"])

    def write(self, folder: Path) -> Path:
        """Write `folder/NAME.json`, one row a line."""
        rows = sorted(self.rounded().table.items())
        lines = [f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in rows]
        head = f'{{"name": {json.dumps(self.name)}, "rows": {{\n'
        path = folder / f"{self.name}.json"
        path.write_text(head + ",\n".join(lines) + "\n}}\n")
        return path

    def rounded(self) -> Recording:
        """As it reads after `write`."""
        rows = {
            name: {column: rounded(value) for column, value in row.items()}
            for name, row in self.table.items()
        }
        return Recording(self.name, rows)


def rounded(value: float) -> float:
    """A number to ten significant digits."""
    return float(f"{value:.{DIGITS}g}")
