"""What training with outliers, contrast and logit adjustment gain on a long tail.

From the run of `conf/results_cifar10_lt.yaml`: ResNet-20 on CIFAR-10-LT by cross-entropy, and by
what is made for long tails. Gains are over cross-entropy, with paired 95 % intervals. The test set
is balanced, so its accuracy is the mean over the classes; classes are grouped as Wang 2022's public
code groups them. PASCL has a row for each stage: the paper takes detection from `pascl` and
accuracy from `pascl_branch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.scored import Scored
from pipelines.experiments import network_results
from pipelines.experiments.result_runs import ResultRun, open_runs
from pipelines.plots import markdown_table

WORDS = ("preset=results_cifar10_lt",)
REFERENCE = "network_cross_entropy"
SCORES = ("msp", "energy")


def run(folder: Path) -> str:
    """Write long_tail_results.csv; return the tables as Markdown.

    Raises:
        ConfigError: where the run is missing, with its command.
    """
    runs, _ = open_runs([WORDS])
    network_results.write(folder / "long_tail_results.csv", runs[0], SCORES)
    return "\n\n".join(
        (
            *network_results.absolute(runs[0], SCORES),
            "Accuracy by the classes' share of the training images, percent:",
            by_share(runs[0]),
            *network_results.gained(runs, REFERENCE, SCORES, over="cross-entropy"),
        )
    )


def by_share(result: ResultRun) -> str:
    """Accuracy of each method on classes with many, medium and few training images."""
    methods = network_results.methods_of(result)
    rows = [
        [name, *(_text(values) for values in _by_group(result.seeds(name)))] for name in methods
    ]
    return markdown_table(["method", "many", "medium", "few"], rows, num_texts=1)


def groups(num_classes: int) -> tuple[range, range, range]:
    """The classes with many, medium and few training images; the first has most.

    The limits are the classes at 34 and 67 % of the order, which count as medium themselves.
    """
    first, last = int(0.34 * num_classes), int(0.67 * num_classes)
    return range(first), range(first, last + 1), range(last + 1, num_classes)


def _by_group(heads: Sequence[Scored]) -> NDArray[np.float64]:
    """Accuracies (groups, seeds) on the test set."""
    labels = heads[0].sets["test"]["label"]
    chosen = [np.isin(labels, classes) for classes in groups(int(labels.max()) + 1)]
    return np.array([[head.correct("test")[mask].mean() for head in heads] for mask in chosen])


def _text(values: NDArray[np.float64]) -> str:
    std = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{100 * values.mean():.1f} ({100 * std:.1f})"
