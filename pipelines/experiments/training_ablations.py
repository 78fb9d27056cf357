"""What each part of the energy losses does: keep, scope and weight; margins; alpha and gamma.

Trained in this process on the features of one run of `conf/results_*.yaml`, around the settings
that its sweep chose, two seeds each; every score with the parameters that were chosen for the
method. The figures are of test images: they choose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.backbones import network as backbones
from pipelines.config import UserError, load
from pipelines.finetune.loop import Trained, TrainingData, TrainingJob, train_in_process
from pipelines.heads import HeadContext, build
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from pipelines.methods import MethodConfig
from pipelines.methods.base import Initial
from pipelines.methods.margins import margins
from pipelines.ood import SCORES, ood_metrics, prior
from pipelines.ood import outlier_counts as count_outliers
from pipelines.plots import INK, label, markdown_table, panels, save, write_csv
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig
from pipelines.sweep import stage as sweep
from pipelines.sweep.space import with_values

WORDS = ("preset=results_pacs", "benchmark.held_out=sketch")
SEEDS = range(2)
KEEPS = (0.1, 0.25, 0.5, 1.0)
SCOPES = ("image", "top")
WEIGHTS = (0.0, 2.0, 10.0, 50.0)
# Added to the mean energies of images and of outliers before training.
SHIFTS = (-2.0, -1.0, 0.0, 1.0)
ALPHAS = (0.0, 1.0, 10.0)
GAMMAS = (0.0, 0.05, 1.0)


@dataclass(frozen=True)
class Found:
    """A setting and its figures, means over seeds: fractions, and what the last epoch reports."""

    setting: tuple[Any, ...]
    id_accuracy: float
    auroc: float
    fpr: float
    report: Mapping[str, float]


@dataclass(frozen=True)
class Bed:
    """One run's features, backbone and chosen settings."""

    run: Run

    @cached_property
    def data(self) -> TrainingData:
        """What heads are trained on."""
        return sweep.training_data(self.run.sets.for_training())

    @cached_property
    def clip(self) -> Any:
        """The loaded backbone."""
        return backbones.load(self.run.backbone)

    @cached_property
    def test(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and labels of the ID test images."""
        found = self.run.sets.load("test")
        return found.features, found.labels

    @cached_property
    def ood(self) -> list[NDArray[np.float32]]:
        """Features of each OOD set."""
        return [self.run.sets.load(name).features for name in self.run.sets.names("ood")]

    @cached_property
    def initial(self) -> Initial:
        """What the zero-shot prompts make of images and outliers."""
        data = self.data
        tensors = torch.tensor(data.features), torch.tensor(data.labels)
        context = HeadContext(self.clip, data.class_names, data.templates, *tensors)
        head = build(ZeroShotConfig(), context, 0)
        outliers = head(torch.tensor(data.outliers)) * head.logit_scale
        return Initial(head(context.features) * head.logit_scale, outliers)

    def chosen(self, method: str) -> tuple[MethodConfig, dict[str, float]]:
        """The setting that the sweep chose, and the parameters of its selection criterion."""
        choice = self.run.swept.methods[method]
        return choice.setting, choice.scores[choice.setting.score]

    def try_settings(
        self, method: str, keys: Sequence[str], settings: Iterable[tuple[Any, ...]]
    ) -> list[Found]:
        """Train and judge every setting of these keys."""
        base, params = self.chosen(method)
        found = []
        for setting in settings:
            config = with_values(base, dict(zip(keys, setting, strict=True)))
            trained = [
                train_in_process(TrainingJob(config, s), self.data, self.clip) for s in SEEDS
            ]
            figures = [self._judge(t, config.score, params) for t in trained]
            accuracy, auroc, fpr = np.mean(figures, axis=0).tolist()
            found.append(Found(setting, accuracy, auroc, fpr, trained[0].history[-1]))
        return found

    def _judge(
        self, trained: Trained, name: str, params: Mapping[str, float]
    ) -> tuple[float, float, float]:
        predictor, (features, labels) = trained.predictor, self.test

        def scores(rows: NDArray[np.float32]) -> NDArray[np.float64]:
            similarity = torch.from_numpy(predictor.similarity(rows)).double()
            tensors = {"similarity": similarity, "logits": similarity * predictor.logit_scale}
            values: NDArray[np.float64] = SCORES[name](**tensors, **params).numpy()
            return values

        inside = scores(features)
        parts = [ood_metrics(inside, scores(rows)) for rows in self.ood]
        right = predictor.predicted(predictor.similarity(features)) == labels
        return (
            float(right.mean()),
            float(np.mean([part["auroc"] for part in parts])),
            float(np.mean([part["fpr_at_tpr"] for part in parts])),
        )


def run(folder: Path) -> str:
    """Write training_ablations.csv and .png; return the tables as Markdown."""
    opened = Run.open(load(PipelineConfig, "pipeline", WORDS), Quiet())
    if not opened.has("sweep"):
        words = " ".join(WORDS)
        raise UserError(f"not in ./outputs yet; run first: python -m jobs.pipeline {words}")
    bed = Bed(opened)
    keeps = bed.try_settings("ebm", ("keep", "scope"), itertools.product(KEEPS, SCOPES))
    weights = bed.try_settings("ebm", ("weight", "scope"), itertools.product(WEIGHTS, SCOPES))
    places, margin_map = _margin_map(bed)
    balance = bed.try_settings(
        "balanced_energy", ("alpha", "gamma"), itertools.product(ALPHAS, GAMMAS)
    )
    named = {"keep, scope": keeps, "weight, scope": weights, "m_in, m_out": margin_map}
    named["alpha, gamma"] = balance
    _write(named, folder / "training_ablations.csv")
    _draw(places, margin_map, balance, folder / "training_ablations.png")
    return _summary(bed, named)


def _margin_map(bed: Bed) -> tuple[tuple[float, float], list[Found]]:
    """Liu 2020's figure 4b: margins around the mean energies, wherever they stay in order."""
    config, _ = bed.chosen("energy_margin")
    found = margins(config.model_copy(update={"m_in": None, "m_out": None}), bed.initial)  # type: ignore[arg-type]
    m_in, m_out = found.m_in, found.m_out
    grid = itertools.product(SHIFTS, SHIFTS)
    settings = [(m_in + a, m_out + b) for a, b in grid if m_in + a < m_out + b]
    return (m_in, m_out), bed.try_settings("energy_margin", ("m_in", "m_out"), settings)


def _write(named: Mapping[str, Sequence[Found]], path: Path) -> None:
    head = ["ablation", "first", "second", "id_accuracy", "auroc", "fpr"]
    write_csv(
        path,
        head,
        [
            (name, *f.setting, f.id_accuracy, f.auroc, f.fpr)
            for name, fs in named.items()
            for f in fs
        ],
    )


def _summary(bed: Bed, named: Mapping[str, Sequence[Found]]) -> str:
    counts = count_outliers(bed.initial.outlier_logits)  # type: ignore[arg-type]
    shares = zip(bed.data.class_names, prior(counts).tolist(), strict=True)
    parts = [f"Run: {' '.join(WORDS)}; {len(SEEDS)} seeds; percent on test images."]
    for name, found in named.items():
        first, second = name.split(", ")
        head = [first, second, "ID ACC", "AUROC", "FPR"]
        lines = [[*_setting(f), *_figures(f)] for f in found]
        if "bound" in found[0].report:
            head += ["bound E0 - E2", "E2 > E0 (%)"]
        parts.append(markdown_table(head, lines))
    parts.append(
        "Measured prior of the outliers: "
        + ", ".join(f"{class_name} {100 * share:.1f} %" for class_name, share in shares)
    )
    return "\n\n".join(parts)


def _figures(found: Found) -> list[str]:
    numbers = [f"{100 * v:.1f}" for v in (found.id_accuracy, found.auroc, found.fpr)]
    if "bound" not in found.report:
        return numbers
    share = 100 * found.report["bound_positive_share"]
    return [*numbers, f"{found.report['bound']:+.4f}", f"{share:.0f}"]


def _setting(found: Found) -> list[str]:
    return [f"{v:.3g}" if isinstance(v, float) else str(v) for v in found.setting]


def _draw(
    places: tuple[float, float], margin_map: Sequence[Found], balance: Sequence[Found], path: Path
) -> None:
    figure, (left, right) = panels(2, width=4.6, height=3.8)
    _grid(left, margin_map, "FPR by margins (Liu 2020, figure 4b)", "m_out", "m_in", mark=places)
    _grid(right, balance, "FPR by alpha and gamma (Choi 2023)", "gamma", "alpha")
    save(figure, path)


def _grid(
    panel: Any,
    found: Sequence[Found],
    title: str,
    x: str,
    y: str,
    *,
    mark: tuple[float, float] | None = None,
) -> None:
    """FPR in percent by both settings; `mark` is the setting that the data give."""
    tops, sides = (sorted({f.setting[place] for f in found}) for place in (1, 0))
    grid = np.full((len(sides), len(tops)), np.nan)
    for f in found:
        grid[sides.index(f.setting[0]), tops.index(f.setting[1])] = 100 * f.fpr
    panel.imshow(grid, cmap="Blues_r", aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = value < (np.nanmin(grid) + np.nanmax(grid)) / 2
            weight = "bold" if (sides[i], tops[j]) == mark else "normal"
            panel.text(
                j, i, f"{value:.1f}", ha="center", va="center", fontsize=7,
                color="white" if dark else INK, fontweight=weight,
            )  # fmt: skip
    panel.set_xticks(range(len(tops)), [f"{v:.3g}" for v in tops])
    panel.set_yticks(range(len(sides)), [f"{v:.3g}" for v in sides])
    label(panel, title=title, x=x, y=y)
