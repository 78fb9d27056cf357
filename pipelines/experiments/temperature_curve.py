"""Liu 2020's curve: FPR at 95 % TPR of the energy score against its temperature T = 1..1000.

Liu et al. 2020, section 4.2 and figure 4: a larger T makes energies less distinguishable, so T = 1
needs no tuning. Here: a small network (64 hidden units, scikit-learn's MLPClassifier) trained on
the train part of digits 0-5; ID is their test part, OOD every digit 6-9 of the test part. MSP at
the same temperatures stands beside it: ODIN's temperature is meant for that score.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from pipelines.experiments.digit_pixels import pixels
from pipelines.ood import energy, fpr_at_tpr, msp
from pipelines.plots import COLOURS, label, markdown_table, panels, save, write_csv

SEEDS = range(5)
TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
SCORES = {"energy": energy, "msp": msp}


def trained_logits(seed: int, *inputs: Tensor) -> list[Tensor]:
    """Logits (N, 6) of each of `inputs` (N, 64), from a network trained on digits 0-5."""
    images, labels = pixels(range(6), "train")
    network = MLPClassifier((64,), max_iter=1000, random_state=seed)
    network.fit(images.numpy(), labels.numpy())
    (first, last), (offset, last_offset) = (
        [torch.from_numpy(values) for values in layer]
        for layer in (network.coefs_, network.intercepts_)
    )
    return [(x @ first + offset).relu() @ last + last_offset for x in inputs]


def curve(seed: int) -> dict[str, list[float]]:
    """FPR at 95 % TPR at every temperature, by score."""
    known, unknown = pixels(range(6), "test")[0], pixels(range(6, 10), "test")[0]
    id_logits, ood_logits = trained_logits(seed, known, unknown)
    return {
        name: [
            fpr_at_tpr(score(id_logits, tau).numpy(), score(ood_logits, tau).numpy())
            for tau in TEMPERATURES
        ]
        for name, score in SCORES.items()
    }


def run(folder: Path) -> str:
    """Write temperature_curve.csv and temperature_curve.png; return the table as Markdown."""
    curves = [curve(seed) for seed in SEEDS]
    rates = {
        name: 100 * torch.tensor([found[name] for found in curves], dtype=torch.float64)
        for name in SCORES
    }
    rows = [
        (seed, tau, *(float(rates[name][i, j]) for name in SCORES))
        for i, seed in enumerate(SEEDS)
        for j, tau in enumerate(TEMPERATURES)
    ]
    write_csv(folder / "temperature_curve.csv", ["seed", "temperature", *SCORES], rows)
    _draw(rates, folder / "temperature_curve.png")
    cells = [
        [f"{tau:g}", *(f"{r[:, j].mean():.1f} ({r[:, j].std():.1f})" for r in rates.values())]
        for j, tau in enumerate(TEMPERATURES)
    ]
    table = markdown_table(["T", *SCORES], cells)
    return f"FPR at 95 % TPR in percent, mean (std) over {len(SEEDS)} networks:\n\n{table}"


def _draw(rates: dict[str, Tensor], path: Path) -> None:
    figure, (panel,) = panels(1, width=4.6)
    for (name, values), colour in zip(rates.items(), COLOURS, strict=False):
        mean, spread = values.mean(dim=0), values.std(dim=0)
        panel.plot(TEMPERATURES, mean, color=colour, label=name, marker="o", markersize=3)
        panel.fill_between(TEMPERATURES, mean - spread, mean + spread, color=colour, alpha=0.15)
    panel.set(xscale="log", ylim=(0, 104))
    label(panel, title="Digits 0-5 against 6-9", x="temperature T", y="FPR at 95 % TPR, %")
    panel.legend(frameon=False, fontsize=8, loc="center right")
    save(figure, path)
