"""400 known and 600 unknown classes of ImageNet: the tables of docs/results_imagenet.md.

From the runs of `conf/results_imagenet.yaml`, one for each draw of the classes: every method with
the scores' default parameters, zero-shot also with those chosen on validation. A figure is a mean
over the draws and its standard deviation is over the draws, each of which has classes and test
images of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from pipelines.config import ConfigError
from pipelines.evaluate.metrics import MEAN, MetricRow, Metrics, Spread
from pipelines.experiments.imagenet_draws import FILE, SEEDS
from pipelines.experiments.result_runs import ResultRun, accuracy_gain, detection_gain, open_runs
from pipelines.experiments.results_all import tables

# Title of a group of tables, and the words of its runs.
VARIANTS = {
    "The scores' default parameters": ("sweep=none",),
    "Zero-shot, parameters chosen on validation": ("sweep=posthoc", "methods=[zero_shot]"),
}
# The rows of Zhu 2025's claim: methods and the scores that judge them.
METHODS, SCORES = ("coop", "ebm"), ("mcm", "delta_energy")


def run(_folder: Path) -> str:
    """The tables as Markdown; no file is written.

    Raises:
        ConfigError: where a run is missing, with the commands.
    """
    parts = []
    for title, chosen in VARIANTS.items():
        draws = [f"benchmark.class_names={FILE}#known_{seed}" for seed in SEEDS]
        runs, missing = open_runs([("preset=results_imagenet", *chosen, draw) for draw in draws])
        if missing:
            raise ConfigError(["not in ./outputs yet; run first:", *missing])
        together = over_draws([result.metrics for result in runs])
        parts += [f"### {title} (`{' '.join(chosen)}`)", *tables(together, over="draws")]
        if set(METHODS) <= set(together.methods):
            parts.append(_gains(runs))
    return "\n\n".join(parts)


def over_draws(draws: Sequence[Metrics]) -> Metrics:
    """The metrics of the first draw with means and standard deviations over all of them.

    Only what the tables show is changed: accuracies, and detection over all OOD sets.
    """
    rows = [_over(list(same)) for same in zip(*(one.rows for one in draws), strict=True)]
    seeds = tuple(range(len(draws)))
    return draws[0].model_copy(update={"rows": tuple(rows), "seeds": seeds})


def _over(same: Sequence[MetricRow]) -> MetricRow:
    first = same[0]
    if any((row.method, row.score) != (first.method, first.score) for row in same):
        raise ValueError("the draws' runs have other methods or scores")
    return first.model_copy(
        update={
            "id_accuracy": _spread([row.id_accuracy for row in same]),
            "ood_accuracy": _spread([row.ood_accuracy for row in same if row.ood_accuracy]),
            "auroc": {MEAN: _spread([row.auroc[MEAN] for row in same])},
            "fpr": {MEAN: _spread([row.fpr[MEAN] for row in same])},
        }
    )


def _spread(values: Sequence[Spread]) -> Spread:
    means = [value.mean for value in values]
    return Spread(mean=mean(means), std=stdev(means))


def _gains(runs: Sequence[ResultRun]) -> str:
    """EBM + DeltaEnergy minus CoOp + MCM, in points with paired 95 % intervals."""
    start, end = zip(METHODS, SCORES, strict=True)
    gains = {
        "ID ACC": accuracy_gain(runs, end[0], start[0], "test"),
        "OOD ACC": accuracy_gain(runs, end[0], start[0], "shifted"),
        "AUROC": detection_gain(runs, end, start, "auroc"),
        "FPR": detection_gain(runs, end, start, "fpr"),
    }
    told = ", ".join(f"{name} {100 * g.value:+.1f} [{100 * g.low:+.1f}, {100 * g.high:+.1f}]"
                     for name, g in gains.items())  # fmt: skip
    return f"EBM + DeltaEnergy minus CoOp + MCM, in points with paired 95 % intervals: {told}."
