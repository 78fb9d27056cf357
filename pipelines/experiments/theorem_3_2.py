"""Theorem 3.2 of the DeltaEnergy paper: what it says, where it holds, where it does not.

The theorem supposes only that the ID sample has the larger top similarity. Then it claims
1) a larger DeltaEnergy for the ID sample; 2) a difference larger than MCM's. Both proofs need more:
the other similarities must be equal (1, any c), and c = 1 besides (2). Here: the exact
counter-examples, how often each claim fails between arbitrary samples (digits 0-5 against 6-9, as
cosines of centred pixels to class means, no vision-language model), and the curve of both scores
as the top similarity alone rises.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipelines.experiments.digit_pixels import pixels
from pipelines.ood import delta_energy, mcm
from pipelines.plots import COLOURS, label, markdown_table, panels, save, write_csv

TAUS = (0.01, 0.1, 0.3, 1.0)
CS = (1, 2, 3)
# (claim, ID similarities, OOD similarities, tau, c)
COUNTER_EXAMPLES = (
    ("1", (0.31, 0.30, 0.30, 0.30), (0.30, 0.05, 0.00, 0.00), 0.1, 1),
    ("1", (0.31, 0.30, 0.30, 0.30), (0.30, 0.05, 0.00, 0.00), 0.1, 2),
    ("2, other similarities equal", (0.60, 0.50, 0.00), (0.50, 0.50, 0.00), 0.1, 2),
)


def gains(id_rows: Tensor, ood_rows: Tensor, tau: float, c: int) -> tuple[Tensor, Tensor]:
    """Score differences ID - OOD of DeltaEnergy and of MCM, row by row."""
    delta = delta_energy(id_rows, tau, c) - delta_energy(ood_rows, tau, c)
    return delta, mcm(id_rows, tau) - mcm(ood_rows, tau)


def digit_similarities() -> tuple[Tensor, Tensor]:
    """Cosines (N, 6) of ID (digits 0-5) and OOD (6-9) test images to the six class means."""
    images, labels = pixels(range(6), "train")
    centre = images.mean(dim=0)
    means = normalize(torch.stack([images[labels == k].mean(dim=0) for k in range(6)]) - centre)
    known, unknown = (
        normalize(pixels(digits, "test")[0] - centre) @ means.T
        for digits in (range(6), range(6, 10))
    )
    return known, unknown


def failures(known: Tensor, unknown: Tensor, tau: float, c: int) -> tuple[float, float]:
    """Shares of the pairs with the larger top similarity on the ID side that break each claim."""
    first = torch.arange(len(known)).repeat_interleave(len(unknown))
    second = torch.arange(len(unknown)).repeat(len(known))
    supposed = known.amax(dim=1)[first] > unknown.amax(dim=1)[second]
    first, second = first[supposed], second[supposed]
    delta = delta_energy(known, tau, c)[first] - delta_energy(unknown, tau, c)[second]
    other = mcm(known, tau)[first] - mcm(unknown, tau)[second]
    return float((delta <= 0).double().mean()), float((delta <= other).double().mean())


def run(folder: Path) -> str:
    """Write theorem_3_2.csv and theorem_3_2.png; return the tables as Markdown."""
    known, unknown = digit_similarities()
    rows = [(tau, c, *failures(known, unknown, tau, c)) for tau in TAUS for c in CS]
    header = ["tau", "c", "pairs against claim 1", "pairs against claim 2"]
    write_csv(folder / "theorem_3_2.csv", header, rows)
    _draw(folder / "theorem_3_2.png")
    percent = [(tau, c, f"{100 * one:.1f} %", f"{100 * two:.1f} %") for tau, c, one, two in rows]
    return "\n\n".join(
        [
            "Counter-examples (the ID sample has the larger top similarity in each):",
            markdown_table(
                ["claim", "ID", "OOD", "tau", "c", "d_DeltaEnergy", "d_MCM"],
                [_counter_example(*example) for example in COUNTER_EXAMPLES],
            ),
            f"Pairs of digits ({len(known)} ID, {len(unknown)} OOD) that meet the supposition and "
            f"break a claim:",
            markdown_table(header, percent),
        ]
    )


def _counter_example(
    claim: str, id_row: tuple[float, ...], ood_row: tuple[float, ...], tau: float, c: int
) -> list[object]:
    id_rows, ood_rows = (torch.tensor([row], dtype=torch.float64) for row in (id_row, ood_row))
    delta, other = gains(id_rows, ood_rows, tau, c)
    return [claim, id_row, ood_row, tau, c, float(delta), float(other)]


def _draw(path: Path) -> None:
    figure, axes = panels(3, width=3.2, height=2.9)
    top = torch.linspace(0.2, 1.0, 161, dtype=torch.float64)
    rows = torch.tensor([0.0, 0.2, 0.1, 0.0], dtype=torch.float64).repeat(len(top), 1)
    rows[:, 0] = top
    for panel, c in zip(axes, CS, strict=True):
        delta, other = gains(rows, rows[:1].expand_as(rows), 0.1, c)
        panel.plot(top, delta, color=COLOURS[3], label="DeltaEnergy")
        panel.plot(top, other, color=COLOURS[2], label="MCM")
        label(panel, title=f"c = {c}, tau = 0.1", x="top similarity", y="gain over s_1 = 0.2")
        panel.legend(frameon=False, fontsize=8)
    save(figure, path)
