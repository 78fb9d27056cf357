"""What needs no training: temperatures, c and other parameters of a score, searched on arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.config import UserError
from pipelines.methods import MethodConfig
from pipelines.ood import FITTED_SCORES, SCORES, auroc, delta_energy_grid, fpr_at_tpr
from pipelines.score import by_name as scoring
from pipelines.score.config import PostHocConfig

# Scores that need nothing but a head's similarities, searched below; `scores=all` means these.
USABLE = scoring.PLAIN
# The neighbour of KNN where nothing is searched, as far as there are so many training features.
_NEIGHBOUR = 50


@dataclass(frozen=True)
class Setting:
    """One setting of a score and what it gives on validation data."""

    params: Mapping[str, float]
    auroc: float
    fpr: float


def usable(scores: Iterable[str], head: str) -> list[str]:
    """The scores, and parts of sums, that a head's similarities give without anything fitted.

    Args:
        scores: names.
        head: the name of the head's kind.
    """
    return [n for n in scoring.with_parts(scores) if n in USABLE and scoring.applies(n, head)]


def settings(
    score: str, config: PostHocConfig, *, num_classes: int, logit_scale: float
) -> list[dict[str, float]]:
    """The parameter settings to try for `score`; one empty setting where it has none."""
    entry = SCORES[score]
    values: dict[str, Sequence[float]] = {}
    if "c" in entry.parameters:
        values["c"] = [c for c in config.c if c <= num_classes] or [1]
    if "gamma" in entry.parameters:
        values["gamma"] = config.gamma
    if "weight" in entry.parameters:
        values["weight"] = config.weight
    if "tau" in entry.parameters:
        others = int(np.prod([len(v) for v in values.values()]))
        scale = logit_scale if entry.input == "logits" else 1.0
        if score == scoring.NEG_LABEL:
            scale = 0.5  # its published 0.01 is then where the usual range begins
        values["tau"] = temperatures(config, max(1, config.budget // others), scale)
    names = sorted(values)
    return [
        dict(zip(names, chosen, strict=True))
        for chosen in itertools.product(*(values[name] for name in names))
    ]


def fitted_settings(score: str, config: PostHocConfig, *, num_train: int) -> list[dict[str, float]]:
    """The parameter settings to try for a fitted score; one empty setting where it has none."""
    if score != "knn":
        return [{}]
    return [{"k": k} for k in config.k if k <= num_train] or [{"k": num_train}]


def defaults(score: str, *, num_train: int) -> dict[str, float]:
    """The parameters of a score, a fitted one or a sum included, where nothing is searched."""
    if scoring.is_sum(score):
        parts = {part: defaults(part, num_train=num_train) for part in scoring.parts(score)}
        return scoring.joined_params(parts)
    if score in SCORES:
        return dict(SCORES[score].parameters)
    if score == "knn":
        return {"k": min(_NEIGHBOUR, num_train)}
    return dict(FITTED_SCORES[score].settings) if score in FITTED_SCORES else {}


def method_defaults(
    method: MethodConfig, scores: Iterable[str], *, num_train: int
) -> dict[str, dict[str, float]]:
    """The parameters of every score under a method where nothing is searched.

    Those in the method's `score_params` come first, so that a sweep's choice is repeated as it
    was; only knn's k, whose default follows the number of training images, is filled in.
    """
    params_of = {}
    for score in scores:
        params = defaults(score, num_train=num_train)
        given = method.score_params.get(score)
        if given is not None:
            params = {k: v for k, v in params.items() if k in ("k", "knn.k")} | given
        params_of[score] = params
    return params_of


def params_problems(
    method: MethodConfig, *, num_classes: int | None = None, num_train: int | None = None
) -> list[str]:
    """What is wrong with a method's `score_params`, one line each.

    Args:
        method: whose they are.
        num_classes: K, which bounds c; None: names are checked, values are not.
        num_train: training images, which bound k; given where `num_classes` is.
    """
    problems = []
    for score, params in method.score_params.items():
        if wrong := scoring.problem(score):
            problems.append(f"score_params: {wrong}")
            continue
        allowed = defaults(score, num_train=num_train or 1)
        unknown = [name for name in params if name not in allowed]
        if unknown:
            listed = ", ".join(allowed) or "none, it has no parameters"
            problems.append(f"score_params.{score}: no parameter {unknown[0]!r}; allowed: {listed}")
        elif num_classes is not None and num_train is not None:
            problems += _value_problems(score, params, num_classes, num_train)
    return problems


def _value_problems(
    score: str, params: Mapping[str, float], num_classes: int, num_train: int
) -> list[str]:
    problems = []
    for part in scoring.parts(score):
        of_part = scoring.part_params(score, part, params)
        if "k" in of_part and part not in SCORES and of_part["k"] not in range(1, num_train + 1):
            problems.append(f"score_params.{score}: k={of_part['k']}: allowed: 1 to {num_train}")
        try:
            if part in USABLE:
                scores_of(part, np.zeros((1, num_classes), np.float32), 1.0, of_part)
        except (ValueError, TypeError) as error:
            problems.append(f"score_params.{score}: {error}")
    return problems


def temperatures(config: PostHocConfig, count: int, scale: float) -> list[float]:
    """`count` log-spaced temperatures, rounded to three digits so that tables can print them.

    Where there are hundreds, six digits keep them apart.
    """
    spaced = np.geomspace(config.tau[0] * scale, config.tau[1] * scale, count)
    digits = 3 if count <= 200 else 6
    return [float(f"{tau:.{digits}g}") for tau in spaced]


def scores_of(
    score: str, similarity: NDArray[np.float32], logit_scale: float, params: Mapping[str, float]
) -> NDArray[np.float64]:
    """A score (N,) in float64 of similarities (N, K)."""
    exact = torch.from_numpy(similarity).double()
    result = SCORES[score](similarity=exact, logits=exact * logit_scale, **params)
    return np.asarray(result.numpy(), dtype=np.float64)


def search(
    score: str,
    id_similarity: NDArray[np.float32],
    ood_similarity: Mapping[str, NDArray[np.float32]],
    logit_scale: float,
    config: PostHocConfig,
) -> list[Setting]:
    """Every setting of `score`, judged by the mean over the OOD sets.

    Args:
        score: its name in SCORES.
        id_similarity: (N, K) of ID validation images.
        ood_similarity: (M, K) of each validation OOD set.
        logit_scale: logits = similarity x logit_scale.
        config: the search space.
    """
    tried = settings(score, config, num_classes=id_similarity.shape[1], logit_scale=logit_scale)
    parts = {"": id_similarity, **ood_similarity}
    whole = np.concatenate(list(parts.values()))
    cuts = np.cumsum([len(part) for part in parts.values()])[:-1]
    if score == "delta_energy":
        return _delta_energy_settings(whole, tried, cuts)
    values = (scores_of(score, whole, logit_scale, params) for params in tried)
    return [
        judge(params, np.split(column, cuts)) for params, column in zip(tried, values, strict=True)
    ]


def _delta_energy_settings(
    similarity: NDArray[np.float32],
    tried: Sequence[Mapping[str, float]],
    cuts: NDArray[np.int64],
) -> list[Setting]:
    """All settings of DeltaEnergy at once: one search for the top similarities.

    Each setting is judged as soon as it is computed, so that the grid of scores is never held.
    """
    taus = sorted({params["tau"] for params in tried})
    cs = sorted({int(params["c"]) for params in tried})
    table = delta_energy_grid(
        torch.from_numpy(similarity).double(),
        taus,
        cs,
        reduce=lambda scores: judge({}, np.split(scores.numpy(), cuts)),
    )
    return [
        replace(table[i][j], params={"c": cs[j], "tau": taus[i]})
        for i, j in itertools.product(range(len(taus)), range(len(cs)))
    ]


def search_held_out_classes(
    score: str,
    similarity: NDArray[np.float32],
    labels: NDArray[np.int64],
    logit_scale: float,
    config: PostHocConfig,
    num_classes: int,
) -> list[Setting]:
    """Every setting of `score`, judged without any OOD image: ID classes are unknown in turn.

    A part of the classes is taken out of the class list, their images are the OOD side, and the
    mean over the parts is reported. Up to ten classes each class is a part, else every
    tenth class belongs to one. The head has been trained with all classes, so its figures are
    not those of unknown classes; the order of settings is what this is for.

    Args:
        score: its name in SCORES.
        similarity: (N, K) of ID validation images, or (N, M K) with M prompts a class.
        labels: (N,) their classes.
        logit_scale: logits = similarity x logit_scale.
        config: the search space.
        num_classes: K; column j is of class j mod K.

    Raises:
        UserError: for fewer than three classes.
    """
    of_class = np.arange(similarity.shape[1]) % num_classes
    if num_classes < 3:
        raise UserError(
            f"{num_classes} classes and neither validation_ood nor outliers: nothing to choose "
            "settings on; add a set validation_ood/NAME, or take the defaults with sweep=none"
        )
    num_parts = min(num_classes, 10)
    # The same settings for every part, whatever is left of the classes.
    largest = -(-num_classes // num_parts)
    fewer = config.model_copy(
        update={"c": [c for c in config.c if c <= num_classes - largest] or [1]}
    )
    of_parts = []
    for part in range(num_parts):
        kept = of_class % num_parts != part
        unknown = labels % num_parts == part
        if unknown.any() and not unknown.all():
            rows = similarity[:, kept]
            ood = {"held out": rows[unknown]}
            of_parts.append(search(score, rows[~unknown], ood, logit_scale, fewer))
    return [_mean(settings) for settings in zip(*of_parts, strict=True)]


def _mean(settings: Sequence[Setting]) -> Setting:
    """One setting of a score, its figures the means over several judgements."""
    return Setting(
        settings[0].params,
        float(np.mean([setting.auroc for setting in settings])),
        float(np.mean([setting.fpr for setting in settings])),
    )


def judge(params: Mapping[str, float], parts: Sequence[NDArray[np.float64]]) -> Setting:
    """A setting by its scores of the ID images and of each OOD set."""
    id_scores, *ood = parts
    return Setting(
        dict(params),
        float(np.mean([auroc(id_scores, scores) for scores in ood])),
        float(np.mean([fpr_at_tpr(id_scores, scores) for scores in ood])),
    )


def best(tried: Sequence[Setting]) -> Setting:
    """The highest AUROC; among equals the lowest FPR; among equals the first."""
    return max(tried, key=lambda s: (s.auroc, -s.fpr))
