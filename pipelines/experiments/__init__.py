"""The papers' claims as numerical experiments, published whatever they show.

`FIGURES` names the module of each: its `run(folder)` writes PNG and CSV files into a folder and
returns a Markdown summary, which docs/ shows. A new experiment is a module and a row here.
`python -m jobs.figures figure=NAME` runs one.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from pipelines.config import UserError

FIGURES = {
    "theorem_3_2": "pipelines.experiments.theorem_3_2",
    "theorem_3_5": "pipelines.experiments.theorem_3_5",
    "proposition_3_6": "pipelines.experiments.proposition_3_6",
    "temperature_curve": "pipelines.experiments.temperature_curve",
    "energy_correction": "pipelines.experiments.energy_correction",
    "demo": "pipelines.experiments.demo",
    "training_results": "pipelines.experiments.training_results",
    "delta_energy_choice": "pipelines.experiments.delta_energy_choice",
    "results_all": "pipelines.experiments.results_all",
    "training_ablations": "pipelines.experiments.training_ablations",
    "image_classifiers": "pipelines.experiments.image_classifiers",
    "precision": "pipelines.experiments.precision",
    "network_results": "pipelines.experiments.network_results",
    "long_tail_results": "pipelines.experiments.long_tail_results",
    "streams": "pipelines.experiments.streams",
    "imagenet_draws": "pipelines.experiments.imagenet_draws",
    "results_imagenet": "pipelines.experiments.results_imagenet",
}


def run(figure: str, folder: Path) -> str:
    """Run an experiment.

    Args:
        figure: A name of `FIGURES`.
        folder: An existing folder for its PNG and CSV files.

    Returns:
        Its Markdown summary.

    Raises:
        UserError: There is no figure of that name.
    """
    if figure not in FIGURES:
        raise UserError(f"figure={figure}: no such figure; allowed: {', '.join(FIGURES)}")
    summary: str = importlib.import_module(FIGURES[figure]).run(folder)
    return summary
