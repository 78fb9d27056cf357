"""How much of the change in validation AUROC each setting of a sweep explains.

A full grid is taken apart exactly: the main effects of a functional ANOVA. So is the surface of a
score's parameters, which always is one. Other samples (random, TPE) go through Optuna's functional
ANOVA over a random forest (Hutter 2014, "An Efficient Approach for Assessing Hyperparameter
Importance"), and only where such a forest predicts trials that it has not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.records import Record
from pipelines.sweep.result import Trial
from pipelines.sweep.surfaces import Row

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Fewer trials than these say nothing of a setting beside others that vary with it: each is one
# training, and chance is in all of them.
MIN_GRID = 8
MIN_SAMPLES = 16
MIN_SAMPLES_PER_SETTING = 6
_TREES = 150

TRAINING = "training settings"
GRID = (
    "share of the variance of validation AUROC over the whole grid that the value alone explains "
    "(main effect of a functional ANOVA)"
)
FOREST = (
    "share of the variance of validation AUROC that the value alone explains in a random forest "
    "over the trials (Optuna's functional ANOVA)"
)
_REST = "what is missing to 100 % is how they act together, and chance"


class Importance(Record):
    """How much of the change in validation AUROC each setting explains.

    Attributes:
        method: whose settings they are.
        of: `training settings`, or the score whose parameters these are.
        num: trials, or settings of the surface.
        how: what a share is; empty where there is none.
        shares: by setting, as fractions of the variance; they need not sum to 1.
        note: why there is none, or what to keep in mind.
    """

    method: str
    of: str
    num: int
    how: str = ""
    shares: dict[str, float] = Field(default_factory=dict)
    note: str = ""


def varied(trials: Sequence[Trial]) -> list[str]:
    """The settings that have more than one value among these trials, in their own order."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    return [k for k in keys if len({str(t.settings.get(k)) for t in trials}) > 1]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a setting's value is a finite number (true and false are words)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis of these values should be logarithmic: all positive, a decade apart."""
    return min(values) > 0 and max(values) / min(values) >= 10


def of_training(trials: Sequence[Trial], criterion: str) -> Importance | None:
    """What the training settings of one method explain; None where none of them varied.

    Args:
        trials: of one method; only those that are done count.
        criterion: the score whose AUROC is explained.
    """
    judged = [
        (t, figures.auroc) for t in trials if t.status == "done" and (figures := t.by(criterion))
    ]
    done, aurocs = [trial for trial, _ in judged], [auroc for _, auroc in judged]
    keys = varied(done)
    if not keys:
        return None
    table = {key: [trial.settings.get(key) for trial in done] for key in keys}
    about = Importance(method=done[0].method, of=TRAINING, num=len(done))
    note = _too_little(table, len(done))
    if not note and not _is_grid(table) and not _is_predictable(table, aurocs):
        note = "no forest predicts unseen trials better than their mean does: nothing to show"
    if note:
        return about.model_copy(update={"note": note})
    whole = _is_grid(table)
    shares = _main_effects(table, aurocs) if whole else _forest_effects(table, aurocs)
    shown = {"how": GRID if whole else FOREST, "shares": shares, "note": _REST}
    return about.model_copy(update=shown)


def of_surface(rows: Sequence[Row], parameters: Sequence[str]) -> Importance | None:
    """What the parameters of one score explain under the chosen head; None where none varied.

    Args:
        rows: every setting of the score.
        parameters: names of the columns that may be parameters of it.
    """
    varied_ones = [p for p in parameters if len({r[p] for r in rows if r[p] is not None}) > 1]
    table = {key: [row[key] for row in rows] for key in varied_ones}
    if not table or not _is_grid(table):
        return None
    about = Importance(method=str(rows[0]["method"]), of=str(rows[0]["score"]), num=len(rows))
    if len(table) == 1:
        return about.model_copy(update={"note": _alone(varied_ones[0])})
    shares = _main_effects(table, [float(row["auroc"] or 0.0) for row in rows])
    return about.model_copy(update={"how": GRID, "shares": shares, "note": _REST})


def _too_little(table: Mapping[str, Sequence[object]], num: int) -> str:
    """Why these trials say nothing of their settings; empty where they may."""
    if len(table) == 1:
        return _alone(next(iter(table)))
    whole = _is_grid(table)
    needed = MIN_GRID if whole else max(MIN_SAMPLES, MIN_SAMPLES_PER_SETTING * len(table))
    if num >= needed:
        return ""
    kind = "in a grid" if whole else "that are no grid"
    return f"too few trials: {num} are done, {len(table)} settings {kind} need {needed}"


def _alone(key: str) -> str:
    return f"only {key} varied: there is nothing to weigh it against"


def _words(column: Sequence[object]) -> list[str]:
    return [str(value) for value in column]


def _is_grid(table: Mapping[str, Sequence[object]]) -> bool:
    """Whether every combination of the values stands there equally often."""
    columns = [_words(column) for column in table.values()]
    counts = Counter(zip(*columns, strict=True))
    full = math.prod(len(set(column)) for column in columns)
    return len(counts) == full and len(set(counts.values())) == 1


def _main_effects(
    table: Mapping[str, Sequence[object]], aurocs: Sequence[float]
) -> dict[str, float]:
    """Exactly, on a full grid: the variance of the means over all else, per variance."""
    array = np.asarray(aurocs)
    whole = array.var()
    shares = {}
    for key, column in table.items():
        words = _words(column)
        groups = np.asarray(words)
        means = [array[groups == value].mean() for value in dict.fromkeys(words)]
        shares[key] = float(np.var(means) / whole) if whole > 0 else 0.0
    return shares


def _is_predictable(table: Mapping[str, Sequence[object]], aurocs: Sequence[float]) -> bool:
    """Whether a random forest predicts trials out of its bags better than their mean does."""
    from sklearn.ensemble import RandomForestRegressor  # half a second, needed by few runs

    forest = RandomForestRegressor(_TREES, oob_score=True, random_state=0, n_jobs=1)
    forest.fit(np.stack([_numbers(column) for column in table.values()], axis=1), aurocs)
    return float(forest.oob_score_) > 0


def _numbers(column: Sequence[object]) -> NDArray[np.float64]:
    """A column for a forest: numbers as they are, words by their place among them."""
    values = _values(column)
    names = sorted({value for value in values if isinstance(value, str)})
    places = [names.index(value) if isinstance(value, str) else value for value in values]
    return np.asarray(places, dtype=np.float64)


def _forest_effects(
    table: Mapping[str, Sequence[object]], aurocs: Sequence[float]
) -> dict[str, float]:
    """Main effects by Optuna, in the order of the table."""
    import optuna  # half a second, needed by few runs

    columns = {key: _values(column) for key, column in table.items()}
    distributions = {key: _distribution(column) for key, column in columns.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=dict(zip(columns, values, strict=True)),
                distributions=distributions,
                value=auroc,
            )
            for *values, auroc in zip(*columns.values(), aurocs, strict=True)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
    shares = evaluator.evaluate(study)  # shares of the variance; not scaled to sum to 1
    return {key: float(shares[key]) for key in table}


def _values(column: Sequence[object]) -> list[float] | list[str]:
    numbers = [float(value) for value in column if is_number(value)]
    return numbers if len(numbers) == len(column) else _words(column)


def _distribution(column: list[float] | list[str]) -> BaseDistribution:
    """What Optuna takes the values as: an interval, logarithmic over decades, or categories."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    numbers = [value for value in column if isinstance(value, float)]
    if not numbers:
        return CategoricalDistribution(sorted(set(map(str, column))))
    return FloatDistribution(min(numbers), max(numbers), log=spans_decades(numbers))
