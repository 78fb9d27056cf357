"""How every experiment writes what it found: one style of picture, CSV and Markdown table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED = "#1c2024", "#63696f"
# Okabe and Ito's colour-blind safe hues.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa3377", "#e69f00", "#56b4e9")


def panels(count: int, *, width: float = 4.0, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels side by side, each `width` x `height` inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    return figure, axes


def label(panel: Axes, *, title: str, x: str, y: str) -> None:
    """Title and axes of a panel, in one size."""
    panel.set_title(title, fontsize=9, loc="left", color=INK)
    panel.set_xlabel(x, fontsize=8.5, color=INK)
    panel.set_ylabel(y, fontsize=8.5, color=INK)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whose bytes do not depend on the machine's date or library version."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows with floats at seven significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value, ".7g") for value in row] for row in rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, floats at three significant digits."""
    lines = [header, ["---"] * len(header)]
    lines += [[_cell(value, ".3g") for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object, spec: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, spec) if isinstance(value, float) else str(value)
