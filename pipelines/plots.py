"""How pictures and tables look everywhere: one palette, SVG and PNG, CSV, Markdown tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

INK, MUTED, LINE, PAPER = "#1c2024", "#63696f", "#d5d9dd", "#fefefe"
# Okabe and Ito's colour-blind safe hues, and a few beside them.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072b2", "#d55e00", "#009e73", "#aa3377", "#e69f00", "#56b4e9",
)  # fmt: skip
PINK, BROWN, OLIVE, SHADE = "#cc79a7", "#8c564b", "#999933", "#fff1cc"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)

# Colours that a page may replace, as CSS variables: the dark ones are too dark on a dark page.
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "paper",
    BLUE: "blue",
    VERMILION: "vermilion",
    PURPLE: "purple",
}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,  # a set may be called "$5 (new)"
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "energy-ood",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(figure: Figure, label: str) -> str:
    """The figure as SVG to stand inside a page: no size of its own, colours as CSS variables."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', text)
    assert size, "matplotlib writes the size of an SVG into its first element"
    shape = (
        f'role="img" style="max-width:{float(size[1]) * 4 / 3:.0f}px" aria-label="{escape(label)}"'
    )
    return text.replace(size[0], shape, 1)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(
            buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


@contextmanager
def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Figure]:
    """A figure of this size in inches in the report's style, while it is drawn."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout=layout)


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


def heat_map(
    pixels: NDArray[np.uint8], values: NDArray[np.float64], side: int = 224
) -> Image.Image:
    """An image under the values of its places, from dark blue (its lowest) to yellow (its highest).

    Args:
        pixels: (H, W, 3) RGB.
        values: (rows, columns), which divide the image evenly; one colour where all are equal.
        side: of the picture's shorter side, pixels; a larger image is made smaller.
    """
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = round(width * scale), round(height * scale)
    span = values.max() - values.min()
    shares = (values - values.min()) / span if span > 0 else np.full(values.shape, 0.5)
    colours = Image.fromarray(mpl.colormaps["viridis"](shares, bytes=True)[..., :3].copy())
    grey = Image.fromarray(pixels).convert("L").convert("RGB")
    below = grey.resize(size, Image.Resampling.BICUBIC)
    return Image.blend(below, colours.resize(size, Image.Resampling.NEAREST), 0.5)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows with floats at seven significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value, ".7g") for value in row] for row in rows)


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, num_texts: int | None = None
) -> str:
    """A Markdown table, floats at three significant digits.

    Args:
        header: the columns' names.
        rows: a cell for each column, escaped where need be.
        num_texts: how many columns from the left are texts, the others being aligned right;
            by default no column is aligned.
    """
    texts = len(header) if num_texts is None else num_texts
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    lines = [header, rule, *([_cell(value, ".3g") for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text: str) -> str:
    """Text whose characters mean themselves in Markdown."""
    for character in "\\|<>*_`[]$":
        text = text.replace(character, f"\\{character}")
    return text


def _cell(value: object, spec: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, spec) if isinstance(value, float) else str(value)
