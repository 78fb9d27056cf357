"""What fine-tuning a network with outliers gained, and what it cost in ID accuracy.

From the run of `conf/results_cifar10_outliers.yaml`: ResNet-20 as it is and fine-tuned by outlier
exposure, energy margins, balanced energy and OECC, three seeds. Each gain is a fine-tuned network
under a score minus the pretrained one under the same score, with its paired 95 % interval, OOD sets
pooled; accuracy is paired by ID test image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.experiments.result_runs import (
    ResultRun,
    accuracy_gain,
    detection_gain,
    open_runs,
)
from pipelines.ood import Interval
from pipelines.plots import markdown_table, write_csv

WORDS = ("preset=results_cifar10_outliers",)
PRETRAINED = "classifier"
SCORES = ("msp", "energy", "knn")


def run(folder: Path) -> str:
    """Write network_results.csv; return the tables as Markdown.

    Raises:
        ConfigError: where the run is missing, with its command.
    """
    runs, _ = open_runs([WORDS])
    methods = list(dict.fromkeys(row.method for row in runs[0].metrics.rows))
    tuned = [name for name in methods if name != PRETRAINED]
    figures = [_figures(runs[0], name, score) for name in methods for score in SCORES]
    gains = [_gains(runs, name, score) for name in tuned for score in SCORES]
    accuracy = [(name, accuracy_gain(runs, name, PRETRAINED, "test")) for name in tuned]
    header = ["method", "score", "auroc", "auroc std", "fpr", "fpr std"]
    write_csv(folder / "network_results.csv", header, figures)
    return "\n\n".join(
        (
            "Percent, mean and standard deviation over seeds, mean of the OOD sets:",
            markdown_table(
                ["method", "score", "ID accuracy", "AUROC", "FPR at 95 % TPR"],
                [
                    [
                        name,
                        score,
                        _accuracy(runs[0], name),
                        f"{a:.1f} ({b:.1f})",
                        f"{c:.1f} ({d:.1f})",
                    ]
                    for name, score, a, b, c, d in figures
                ],
                num_texts=2,
            ),
            "Points gained over the pretrained network under the same score:",
            markdown_table(
                ["method", "score", "AUROC", "FPR"],
                [[name, score, _text(auroc), _text(fpr)] for name, score, auroc, fpr in gains],
                num_texts=2,
            ),
            "ID accuracy, points:",
            markdown_table(
                ["method", "accuracy"], [[n, _text(i)] for n, i in accuracy], num_texts=1
            ),
        )
    )


def _figures(
    run: ResultRun, method: str, score: str
) -> tuple[str, str, float, float, float, float]:
    row = run.metrics.row(method, score)
    auroc, fpr = row.auroc["mean"], row.fpr["mean"]
    return method, score, 100 * auroc.mean, 100 * auroc.std, 100 * fpr.mean, 100 * fpr.std


def _accuracy(run: ResultRun, method: str) -> str:
    value = run.metrics.row(method, SCORES[0]).id_accuracy
    return f"{100 * value.mean:.2f} ({100 * value.std:.2f})"


def _gains(
    runs: Sequence[ResultRun], method: str, score: str
) -> tuple[str, str, Interval, Interval]:
    places = (method, score), (PRETRAINED, score)
    return (
        method,
        score,
        detection_gain(runs, *places, "auroc"),
        detection_gain(runs, *places, "fpr"),
    )


def _text(gain: Interval) -> str:
    return f"{100 * gain.value:+.2f} [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
