"""The scores of a trained head as arrays, by set, and paired intervals between two heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.evaluate.metrics import MEAN, DifferenceMetric
from pipelines.ood import Interval, Resampled, resampled
from pipelines.records import HeadKey, Known, SetName

# The metrics of `pipelines.ood.METRICS` that tables show, by their short names.
FIGURES = {
    "auroc": "auroc",
    "fpr": "fpr_at_tpr",
    "fpr_ood": "fpr_at_tpr_ood",
    "aupr_id": "aupr_id",
    "aupr_ood": "aupr_ood",
}
DIFFERENCES: tuple[DifferenceMetric, ...] = ("auroc", "fpr")


@dataclass(frozen=True)
class Scored:
    """The scores of one head (one method, one seed)."""

    table: pa.Table

    @cached_property
    def sets(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Columns as arrays, by set."""
        names = np.asarray(self.table["set"].to_pylist(), dtype=object)
        columns = {c: self.table[c].to_numpy() for c in self.table.column_names if c != "set"}
        return {n: {c: v[names == n] for c, v in columns.items()} for n in sorted(set(names))}

    @property
    def shifted(self) -> list[str]:
        """The names of the shifted sets."""
        return [name for name in self.sets if SetName.parse(name).role == "shifted"]

    def of_validation(self, known: Known) -> list[str]:
        """The names of the ID validation set, and of the shifted ones where they are asked for."""
        shifted = [name for name in self.sets if SetName.parse(name).role == "validation_shifted"]
        return ["validation", *(shifted if known == "full_spectrum" else ())]

    @property
    def ood_groups(self) -> dict[str, list[str]]:
        """The OOD sets by group, and all of them as the group `mean`."""
        names = [SetName.parse(name) for name in self.sets]
        ood = [name for name in names if name.role == "ood"]
        found: dict[str, list[str]] = {}
        for name in ood:
            found.setdefault(name.group, []).append(str(name))
        return {**found, MEAN: [str(name) for name in ood]}

    @property
    def ood(self) -> list[str]:
        """The names of all OOD sets."""
        return self.ood_groups[MEAN]

    def has(self, score: str) -> bool:
        """Whether this head was judged by that score."""
        return f"score_{score}" in self.table.column_names

    def scores(self, score: str, *names: str) -> NDArray[np.float64]:
        """The scores of these sets, one set after the other."""
        return np.concatenate([self.sets[name][f"score_{score}"] for name in names])

    def resampled(
        self, metric: DifferenceMetric, score: str, ood: Sequence[str], num_resamples: int
    ) -> Resampled:
        """A metric of ID test against the pooled images of these OOD sets, with its resamples.

        Each score and choice of sets is resampled once, for every metric and comparison.
        """
        place = (score, tuple(ood), num_resamples)
        if place not in self._resampled:
            sides = self.scores(score, "test"), self.scores(score, *ood)
            found = resampled([FIGURES[name] for name in DIFFERENCES], sides, num_resamples)
            self._resampled[place] = dict(zip(DIFFERENCES, found, strict=True))
        return self._resampled[place][metric]

    @cached_property
    def _resampled(
        self,
    ) -> dict[tuple[str, tuple[str, ...], int], dict[DifferenceMetric, Resampled]]:
        return {}

    def correct(self, name: str) -> NDArray[np.bool_]:
        """Where the predicted class is the label, in one set."""
        chosen = self.sets[name]
        right: NDArray[np.bool_] = chosen["predicted"] == chosen["label"]
        return right

    def accuracy(self, name: str) -> float:
        """The share of the set's images whose predicted class is their label."""
        return float(self.correct(name).mean())


def heads_of(
    scored: Mapping[HeadKey, Scored], method: str, variant: str = "chosen"
) -> list[Scored]:
    """The heads of a method, seed by seed.

    Args:
        scored: of all heads.
        method: its name.
        variant: of its chosen or of its default setting.
    """
    keys = [key for key in scored if (key.method, key.variant) == (method, variant)]
    return [scored[key] for key in sorted(keys, key=lambda key: key.seed)]


def paired_difference(first: Sequence[Resampled], second: Sequence[Resampled]) -> Interval:
    """Mean over seeds of first - second, with its 95 % paired bootstrap interval.

    The images of a group's sets are pooled. The ends of the interval are means of the ends of
    each seed's interval, which is wide rather than narrow: seeds do not cancel.
    """
    return Interval.mean([a.minus(b) for a, b in zip(first, second, strict=True)])
