"""Scores in, evidence out: the one place where test scores become numbers.

The threshold of a score is set on ID validation (the `target_tpr` quantile); test data only
report what it gives. Groups (near, far) are unweighted means over their sets. Differences
between scores are judged by a paired bootstrap over the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import UserError
from pipelines.evaluate import against_default, compare
from pipelines.evaluate.against_default import ChosenSetting, DefaultSetting
from pipelines.evaluate.config import CompareConfig, EvaluateConfig, ThresholdConfig
from pipelines.evaluate.metrics import (
    Comparison,
    Facts,
    MetricRow,
    Metrics,
    Threshold,
)
from pipelines.evaluate.scored import FIGURES, Scored, heads_of
from pipelines.fitted.result import EnergyModelHistory, HeadTraining
from pipelines.ood import augrc, aurc, conformal, expected_calibration_error, ood_metrics
from pipelines.records import HeadKey, Params

# A figure, or figures by name: what is averaged over seeds number by number.
Figures: TypeAlias = "float | Mapping[str, Figures]"
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What the tables of scores are judged with.

    Attributes:
        facts: what the figures are of.
        criterion: the rule by which settings were chosen, in words.
        choices: what validation chose, by method; its scores are the rows.
        target_tpr: of the threshold and of FPR.
        threshold: how the threshold follows from it.
        settings: the bootstrap.
        compare: which rows are compared.
        defaults: the default settings, by method, that the chosen ones are compared with.
        trainings: how the heads were trained.
        energy_models: the trainings of energy-based models in feature space.
    """

    facts: Facts
    criterion: str
    choices: Mapping[str, ChosenSetting]
    target_tpr: float
    settings: EvaluateConfig
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    defaults: Mapping[str, DefaultSetting] = field(default_factory=dict)
    trainings: Sequence[HeadTraining] = ()
    energy_models: Sequence[EnergyModelHistory] = ()


def run(
    tables: Mapping[HeadKey, pa.Table],
    evaluation: Evaluation,
    *,
    on_progress: Progress | None = None,
) -> Metrics:
    """All figures of a run.

    Args:
        tables: the scores of every head, those of the default settings among them.
        evaluation: what they are judged with.
        on_progress: called with (rows done, in all).

    Raises:
        UserError: where there is no set to put the threshold on, or none to judge it by.
    """
    scored = {key: Scored(table) for key, table in tables.items()}
    _check_sets(scored.values())
    num_resamples = evaluation.settings.num_resamples
    methods = list(dict.fromkeys(key.method for key in scored))
    rows: list[MetricRow] = []
    differences: list[Comparison] = []
    total = sum(len(evaluation.choices[method].scores) for method in methods)
    for method in methods:
        heads, scores = heads_of(scored, method), evaluation.choices[method].scores
        for score, params in scores.items():
            rows.append(_row((method, score), params, heads, evaluation))
            if on_progress:
                on_progress(len(rows), total)
        reference = evaluation.compare.reference
        differences += compare.comparisons(
            method, list(scores), heads, reference=reference, num_resamples=num_resamples
        )
    places = [(row.method, row.score) for row in rows]
    gains = compare.gains(evaluation.compare, scored, places, num_resamples)
    return Metrics(
        facts=evaluation.facts,
        target_tpr=evaluation.target_tpr,
        seeds=tuple(sorted({key.seed for key in scored})),
        criterion=evaluation.criterion,
        rows=tuple(rows),
        comparisons=tuple(differences),
        gains=gains,
        sentence=compare.sentence(evaluation.compare, gains),
        best_against_default=against_default.compare(
            scored, evaluation.choices, evaluation.defaults, num_resamples=num_resamples
        ),
        trainings=tuple(evaluation.trainings),
        energy_models=tuple(evaluation.energy_models),
    )


def _check_sets(heads: Collection[Scored]) -> None:
    for needed, purpose in (("validation", "set the threshold on"), ("test", "judge")):
        if any(needed not in head.sets for head in heads):
            raise UserError(f"the benchmark has no set {needed!r} to {purpose}")


def _row(
    place: tuple[str, str], params: Params, heads: Sequence[Scored], evaluation: Evaluation
) -> MetricRow:
    method, score = place
    per_seed = [_figures(head, score, evaluation) for head in heads]
    id_scores = _validation_scores(heads[0], score, evaluation)
    return MetricRow(
        method=method,
        score=score,
        params=dict(params),
        is_criterion=evaluation.choices[method].setting.score == score,
        label=evaluation.compare.label(method, score),
        threshold=_threshold(id_scores, evaluation),
        **_spread(per_seed),
    )


def _figures(head: Scored, score: str, evaluation: Evaluation) -> dict[str, Figures]:
    """Every figure of a `MetricRow` for one head and score: a tree of numbers."""
    id_scores, shifted, target_tpr = head.scores(score, "test"), head.shifted, evaluation.target_tpr
    right = head.correct("test")
    per_set = {
        name: ood_metrics(id_scores, head.scores(score, name), target_tpr) for name in head.ood
    }
    threshold = _lowest_accepted(_validation_scores(head, score, evaluation), evaluation)
    accuracies = {name: head.accuracy(name) for name in shifted}

    def accepted(names: Sequence[str]) -> dict[str, float]:
        return {n: float((head.scores(score, n) >= threshold).mean()) for n in names}

    figures: dict[str, Figures] = {
        "id_accuracy": head.accuracy("test"),
        "shifted": accuracies,
        "ece": expected_calibration_error(head.sets["test"]["confidence"], right),
        "aurc": aurc(id_scores, right),
        "augrc": augrc(id_scores, right),
        "sets": {n: {k: f[m] for k, m in FIGURES.items()} for n, f in per_set.items()},
        "tpr": accepted(["test", *shifted]),
        "validation_fpr": accepted(list(per_set)),
    }
    if shifted:
        figures["ood_accuracy"] = float(np.mean(list(accuracies.values())))
    for figure, metric in FIGURES.items():
        figures[figure] = {
            group: float(np.mean([per_set[name][metric] for name in names]))
            for group, names in head.ood_groups.items()
            if names
        }
    if per_set:
        figures["full_spectrum"] = _full_spectrum(head, score, target_tpr)
    return figures


def _validation_scores(head: Scored, score: str, evaluation: Evaluation) -> NDArray[np.float64]:
    """The scores of the validation images that the threshold is set on."""
    return head.scores(score, *head.of_validation(evaluation.threshold.known))


def _full_spectrum(head: Scored, score: str, target_tpr: float) -> dict[str, float]:
    """Detection with the shifted images counted as ID, means over the OOD sets."""
    known = head.scores(score, "test", *head.shifted)
    full = [ood_metrics(known, head.scores(score, name), target_tpr) for name in head.ood]
    return {
        "auroc": float(np.mean([figures["auroc"] for figures in full])),
        "fpr": float(np.mean([figures["fpr_at_tpr"] for figures in full])),
    }


def _spread(per_seed: Sequence[Any]) -> Any:
    """Mean and sample standard deviation over seeds of every number in equal trees."""
    if isinstance(per_seed[0], dict):
        return {key: _spread([tree[key] for tree in per_seed]) for key in per_seed[0]}
    values = np.asarray(per_seed, dtype=np.float64)
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": std}


def _rank(num_images: int, evaluation: Evaluation) -> int:
    """Which of the ID validation scores, from the lowest, is the threshold.

    Raises:
        UserError: where there are too few for what is promised.
    """
    rule = evaluation.threshold
    try:
        return conformal.threshold_rank(
            num_images, evaluation.target_tpr, rule.rule, rule.confidence
        )
    except ValueError as error:
        raise UserError(
            f"threshold.rule={rule.rule}, target_tpr={evaluation.target_tpr:g}, ID validation: "
            f"{error}; or take threshold.rule=quantile, which promises nothing of new images"
        ) from None


def _lowest_accepted(id_scores: NDArray[np.float64], evaluation: Evaluation) -> float:
    """The threshold: the lowest of these scores of ID validation images that is accepted.

    Raises:
        UserError: as `_rank`.
    """
    _rank(len(id_scores), evaluation)
    rule = evaluation.threshold
    return conformal.threshold(id_scores, evaluation.target_tpr, rule.rule, rule.confidence)


def _threshold(id_scores: NDArray[np.float64], evaluation: Evaluation) -> Threshold:
    """The threshold on ID validation with its 95 % bootstrap interval and sample size."""
    size, num_resamples = len(id_scores), evaluation.settings.num_resamples
    generator = np.random.default_rng(0)
    drawn = generator.integers(size, size=(num_resamples, size))
    rank = _rank(size, evaluation) - 1
    values = np.partition(id_scores[drawn], rank, axis=1)[:, rank]
    low, high = np.quantile(values, [0.025, 0.975])
    return Threshold(
        value=_lowest_accepted(id_scores, evaluation),
        low=float(low),
        high=float(high),
        num_images=size,
        rule=evaluation.threshold.rule,
        known=evaluation.threshold.known,
    )
