"""The rule that chooses a method's setting among its trials.

Among a method's trials whose ID validation accuracy is within `accuracy_tolerance` of its best,
the one whose selection criterion (the method's `score`) has the highest mean AUROC against what
stands for the unknown; among equals the first. For every score under that head, the parameters
with the highest AUROC. A method's losses never choose: the DeltaEnergy bound is best, 0, where it
does nothing (keep = 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config import UserError
from pipelines.methods import MethodConfig
from pipelines.score import search as posthoc
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import NO_DETECTION, Choice, JudgedOn, SweepResult, Trial
from pipelines.sweep.spec import Spec
from pipelines.sweep.trial_record import TrialRecord

_WITHIN = "within the tolerance of the best"
CRITERIA: Mapping[JudgedOn, str] = {
    "validation_ood": "highest validation AUROC of the method's selection criterion among trials "
    f"whose ID validation accuracy is {_WITHIN}",
    "outliers": "highest AUROC of the method's selection criterion against the outliers (no "
    "validation_ood is given, and no method learns from them) among trials whose ID validation "
    f"accuracy is {_WITHIN}",
    "held_out_classes": "ID data alone: highest AUROC of the method's selection criterion with ID "
    f"classes held out in turn, among trials whose ID validation accuracy is {_WITHIN}; fitted "
    "scores keep their defaults",
    "none": "none: the defaults of every method and score",
}


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that came to an end: what was asked, its number among the method's, its record."""

    spec: Spec
    number: int
    record: TrialRecord

    def trial(self) -> Trial:
        """The trial as `sweep.json` has it."""
        return Trial(
            method=self.spec.method,
            trial=self.number,
            settings=self.spec.settings,
            status=self.record.status,
            reason=self.record.reason,
            accuracy=self.record.accuracy,
            seconds=self.record.seconds,
            scores=self.record.scores,
        )

    @property
    def accuracy(self) -> float:
        """ID validation accuracy; of a trial that has one."""
        assert self.record.accuracy is not None
        return self.record.accuracy

    @property
    def criterion_auroc(self) -> float:
        """The AUROC that the method is chosen by."""
        return (self.record.by(self.spec.criterion) or NO_DETECTION).auroc


def choose(trials: Sequence[FinishedTrial], accuracy_tolerance: float) -> FinishedTrial:
    """The chosen one of a method's trials, by the rule at the head of this file.

    Args:
        trials: all of one method.
        accuracy_tolerance: ID validation accuracy that a better AUROC may cost.

    Raises:
        UserError: where every trial failed.
    """
    done = [trial for trial in trials if trial.record.status == "done"]
    if not done:
        first = trials[0]
        raise UserError(
            f"sweep: every trial of {first.spec.method} failed ({len(trials)}); the first "
            f"({first.spec.settings or 'its defaults'}): {first.record.reason}"
        )
    floor = max(trial.accuracy for trial in done) - accuracy_tolerance
    accurate = [trial for trial in done if trial.accuracy >= floor]
    return max(accurate, key=lambda trial: trial.criterion_auroc)


def choice_of(chosen: FinishedTrial) -> Choice:
    """The chosen trial as `sweep.json` has it."""
    record = chosen.record
    return Choice(
        setting=chosen.spec.config,
        chosen=chosen.spec.settings,
        trial=chosen.number,
        scores={score: figures.params for score, figures in record.scores.items()},
        validation=record.scores,
        accuracy=record.accuracy,
    )


def result_of(
    finished: Mapping[str, Sequence[FinishedTrial]],
    choices: Mapping[str, Choice],
    settings: SweepConfig,
    judged_on: JudgedOn,
) -> SweepResult:
    """The result of a sweep.

    Args:
        finished: all trials, by method.
        choices: the choice of each method.
        settings: the search space.
        judged_on: what stood for the unknown.
    """
    return SweepResult(
        criterion=CRITERIA[judged_on],
        judged_on=judged_on,
        sampler=settings.sampler,
        scheduler=settings.scheduler,
        accuracy_tolerance=settings.accuracy_tolerance,
        budget=settings.posthoc.budget,
        methods=dict(choices),
        trials=tuple(trial.trial() for trials in finished.values() for trial in trials),
    )


def defaults(
    methods: Mapping[str, MethodConfig], scores: Sequence[str], *, num_train: int
) -> SweepResult:
    """The result of a sweep that searches nothing."""
    choices = {
        name: Choice(
            setting=method,
            scores=posthoc.method_defaults(method, scores, num_train=num_train),
        )
        for name, method in methods.items()
    }
    return SweepResult(criterion=CRITERIA["none"], methods=choices)
