"""Which method and score become the registered detector: chosen on validation data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipelines.config import UserError
from pipelines.methods import MethodConfig
from pipelines.register.config import AUTO, RegisterConfig
from pipelines.score import by_name as scoring


class ValidationFigures(Protocol):
    """AUROC and FPR of a score on validation data, in [0, 1]."""

    @property
    def auroc(self) -> float:
        """Higher is better."""

    @property
    def fpr(self) -> float:
        """Lower is better."""


class ValidatedChoice(Protocol):
    """What validation says of one method; `pipelines.sweep.result.Choice` is one."""

    @property
    def accuracy(self) -> float | None:
        """On ID validation; None where nothing was searched."""

    @property
    def validation(self) -> Mapping[str, ValidationFigures]:
        """The figures of every score that validation could judge."""


@dataclass(frozen=True)
class OnValidation:
    """What validation says of a method, where no sweep has said it."""

    accuracy: float
    validation: Mapping[str, ValidationFigures]


class Champion(NamedTuple):
    """The method and the score of the detector that is registered."""

    method: str
    score: str


def champion(
    methods: Mapping[str, MethodConfig],
    scores: Sequence[str],
    choices: Mapping[str, ValidatedChoice],
    settings: RegisterConfig,
    *,
    accuracy_tolerance: float,
) -> Champion:
    """The method and score to register.

    Among methods whose ID validation accuracy is within the tolerance of the best, the pair with
    the highest validation AUROC, then the lowest FPR. Where nothing was judged on validation, the
    last method with its selection criterion, or its first score that applies.

    Args:
        methods: of the run, as configured, by name.
        scores: of the run.
        choices: what validation says of each method.
        settings: may ask for a method or a score.
        accuracy_tolerance: ID validation accuracy that a better AUROC may cost.

    Raises:
        UserError: where the method or score that is asked for is not in the run.
    """
    _check("method", settings.method, list(choices))
    _check("score", settings.score, list(scores))
    judged = {
        method: choice
        for method, choice in choices.items()
        if choice.validation and settings.method in (AUTO, method)
    }
    if not judged:
        method = list(methods)[-1] if settings.method == AUTO else settings.method
        score = _criterion(methods[method], scores) if settings.score == AUTO else settings.score
        return Champion(method, score)
    floor = max(_accuracy(choice) for choice in judged.values()) - accuracy_tolerance
    pairs = [
        (figures.auroc, -figures.fpr, Champion(method, score))
        for method, choice in judged.items()
        if _accuracy(choice) >= floor
        for score, figures in choice.validation.items()
        if settings.score in (AUTO, score)
    ]
    return max(pairs, key=lambda pair: pair[:2])[2]


def _check(key: str, wanted: str, names: Sequence[str]) -> None:
    if wanted not in (AUTO, *names):
        raise UserError(
            f"register_as.{key}={wanted}: not in this run; allowed: {AUTO}, {', '.join(names)}"
        )


def _accuracy(choice: ValidatedChoice) -> float:
    assert choice.accuracy is not None  # measured with the figures of its scores
    return choice.accuracy


def _criterion(method: MethodConfig, scores: Sequence[str]) -> str:
    """The method's selection criterion, or the first score that applies to its head."""
    known = [score for score in scores if scoring.applies(score, method.head.name)]
    return method.score if method.score in known else (known or scores)[0]
