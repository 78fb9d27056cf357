"""What the stage evaluate writes: `metrics.json`, every figure of a run.

Rates (accuracies, AUROC, FPR, TPR) are fractions in [0, 1]. A `Spread` is over seeds, an
`Interval` over bootstrap resamples of images. Sets are named as they are written
(`pipelines.records.SetName`), groups of OOD sets by their name; the group of all is `mean`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, JsonValue

from pipelines.fitted.result import EnergyModelHistory, HeadTraining
from pipelines.ood import Interval
from pipelines.ood.conformal import ThresholdRule
from pipelines.records import Known, Record, StoredRecord

# The group of all OOD sets.
MEAN = "mean"
# The metrics that differences are given of.
DifferenceMetric: TypeAlias = Literal["auroc", "fpr"]
# The steps from one marked row to the other: another training, another score, both.
Step: TypeAlias = Literal["training", "score", "both"]
# The value of a method's dotted key: a number, a word, a list of templates, null.
SettingValue: TypeAlias = JsonValue


class Rejected(Record):
    """An image that cannot be used."""

    source: str
    key: str
    reason: str
    message: str


class Facts(Record):
    """What a run's figures are of.

    Attributes:
        benchmark, backbone: their names.
        class_names: of the known classes.
        notes: what the benchmark says of itself.
        sets: the number of images of each set.
        rejected: the images that are left out of all figures.
        shared: sentences on images that count twice, in two sets or in one.
    """

    benchmark: str
    backbone: str
    class_names: tuple[str, ...] = ()
    notes: str = ""
    sets: dict[str, int] = Field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    shared: tuple[str, ...] = ()


class Spread(Record):
    """A mean over seeds and its sample standard deviation (0 of one seed)."""

    mean: float
    std: float


class Threshold(Record):
    """A threshold on ID validation scores: an image with a lower score is called OOD.

    Attributes:
        value: of the first seed.
        low, high: its 95 % bootstrap interval.
        num_images: the ID validation images that it was set on.
        rule: how it follows from their scores (`pipelines.ood.conformal.threshold_rank`).
        known: whether shifted validation images are among them.
    """

    value: float
    low: float
    high: float
    num_images: int
    rule: ThresholdRule = "quantile"
    known: Known = "validation"

    def meant_for(self, target_tpr: float) -> str:
        """Words for the images that the threshold is set to accept, with their share."""
        what = "ID validation" if self.known == "validation" else "ID and shifted validation"
        share, images = f"{100 * target_tpr:g} %", f"{self.num_images:,} {what} images"
        if self.rule == "quantile":
            return f"{share} of {images}"
        when = "" if self.rule == "conformal" else ", with confidence over calibration sets"
        return f"{share} of new ID images{when} ({self.rule}, {images})"


class Detection(Record):
    """How well one score tells ID images from OOD ones."""

    auroc: Spread
    fpr: Spread


class SetDetection(Detection):
    """The same for one OOD set, and what is asked with the OOD images positive.

    Attributes:
        fpr_ood: the share of ID images rejected where the target of OOD images is rejected.
        aupr_id, aupr_ood: areas under precision and recall of either side.
    """

    fpr_ood: Spread
    aupr_id: Spread
    aupr_ood: Spread


class MetricRow(Record):
    """A method judged by a score.

    Attributes:
        method, score: their names.
        params: the score's parameters.
        is_criterion: whether the score is the method's selection criterion.
        label: what the configuration's `compare` section calls this row; empty for others.
        id_accuracy: on ID test.
        ood_accuracy: mean over the shifted sets; None where there is none.
        shifted: accuracy on each shifted set.
        ece: expected calibration error on ID test.
        aurc, augrc: areas under the risk-coverage curves on ID test, of a classifier that abstains
            on low scores.
        auroc, fpr, fpr_ood, aupr_id, aupr_ood: by group of OOD sets, unweighted means over its
            sets.
        sets: detection of each OOD set.
        full_spectrum: detection with the shifted images counted as ID; None without OOD sets.
        threshold: set on ID validation.
        tpr: the share of ID test and of each shifted set that this threshold accepts.
        validation_fpr: the share of each OOD set that it accepts.
    """

    method: str
    score: str
    params: dict[str, int | float]
    is_criterion: bool = False
    label: str = ""
    id_accuracy: Spread
    ood_accuracy: Spread | None = None
    shifted: dict[str, Spread]
    ece: Spread
    aurc: Spread
    augrc: Spread
    auroc: dict[str, Spread]
    fpr: dict[str, Spread]
    fpr_ood: dict[str, Spread]
    aupr_id: dict[str, Spread]
    aupr_ood: dict[str, Spread]
    sets: dict[str, SetDetection]
    full_spectrum: Detection | None = None
    threshold: Threshold
    tpr: dict[str, Spread]
    validation_fpr: dict[str, Spread]


class Comparison(Record):
    """The difference of two scores under one head, on the same images.

    Attributes:
        method: whose heads.
        first, second: the scores; the difference is first minus second.
        group: of the OOD sets, whose images are pooled.
        metric: `auroc` or `fpr`.
        difference: mean over seeds, with its 95 % paired bootstrap interval.
    """

    method: str
    first: str
    second: str
    group: str
    metric: DifferenceMetric
    difference: Interval


class Gain(Record):
    """What one step of the way between the two marked rows changed, all OOD images pooled."""

    step: Step
    auroc: Interval
    fpr: Interval


class ChosenAgainstDefault(Record):
    """One metric under the default and under the chosen setting, and their difference."""

    default: float
    chosen: float
    difference: Interval


class DefaultComparison(Record):
    """What the sweep's choice brought one method under one score, all OOD images pooled.

    Attributes:
        method, score: their names.
        is_criterion: whether the score is the method's selection criterion.
        seeds: which are compared.
        default_setting, chosen_setting: the values of the searched keys, by dotted key.
        default_params, chosen_params: the score's parameters.
        auroc, fpr: both figures and their difference.
    """

    method: str
    score: str
    is_criterion: bool
    seeds: tuple[int, ...]
    default_setting: dict[str, SettingValue]
    chosen_setting: dict[str, SettingValue]
    default_params: dict[str, int | float]
    chosen_params: dict[str, int | float]
    auroc: ChosenAgainstDefault
    fpr: ChosenAgainstDefault


class Metrics(StoredRecord):
    """The content of `metrics.json`.

    Attributes:
        facts: what the figures are of.
        target_tpr: of the thresholds and of FPR.
        seeds: in order.
        criterion: the rule by which settings were chosen, in words.
        rows: every method by every score, methods in the order of the run.
        comparisons: the reference score minus each other one, where one is named.
        gains: of the steps between the two marked rows, where they are named and in the run.
        sentence: the gains in words.
        best_against_default: the chosen settings against the default ones, where they differ.
        trainings: of the heads that the rows judge.
        energy_models: the trainings of energy-based models in feature space.
    """

    facts: Facts
    target_tpr: float
    seeds: tuple[int, ...]
    criterion: str
    rows: tuple[MetricRow, ...]
    comparisons: tuple[Comparison, ...] = ()
    gains: tuple[Gain, ...] = ()
    sentence: str = ""
    best_against_default: tuple[DefaultComparison, ...] = ()
    trainings: tuple[HeadTraining, ...] = ()
    energy_models: tuple[EnergyModelHistory, ...] = ()

    def row(self, method: str, score: str) -> MetricRow:
        """The row of a method under a score.

        Raises:
            KeyError: where the run has none.
        """
        for row in self.rows:
            if (row.method, row.score) == (method, score):
                return row
        raise KeyError(f"{method} + {score}")

    @property
    def methods(self) -> dict[str, tuple[MetricRow, ...]]:
        """The rows of each method, in order."""
        names = dict.fromkeys(row.method for row in self.rows)
        return {name: tuple(r for r in self.rows if r.method == name) for name in names}

    def criterion_row(self, method: str) -> MetricRow:
        """The row of the method's selection criterion; a marked one or the first where it is not.

        A criterion that is not among the run's scores has no row.
        """
        rows = self.methods[method]
        chosen = [row for row in rows if row.is_criterion]
        marked = [row for row in rows if row.label]
        return [*chosen, *marked, *rows][0]
