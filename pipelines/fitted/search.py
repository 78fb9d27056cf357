"""The sweep's search over fitted scores: each setting is fitted, then judged on validation data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from pipelines.data.storage import Storage
from pipelines.fitted import fit
from pipelines.fitted import plan as fit_plan
from pipelines.fitted.plan import FitData
from pipelines.heads import Predictor
from pipelines.methods import MethodConfig
from pipelines.methods.energy_models import density_fields
from pipelines.score import by_name as scoring
from pipelines.score import search as posthoc
from pipelines.score.config import PostHocConfig
from pipelines.score.search import Setting

# The settings that were tried of each score, and what each gives.
Tried = Mapping[str, Sequence[Setting]]


@dataclass(frozen=True)
class Context:
    """A trial's trained head, and what scores are fitted with.

    Attributes:
        predictor: the head.
        method: that trained it.
        methods: the run's, by name.
        data: what is fitted to.
        storage: where energy models are kept.
    """

    predictor: Predictor
    method: MethodConfig
    methods: Mapping[str, MethodConfig]
    data: FitData
    storage: Storage


def densities(
    scores: Sequence[str], methods: Mapping[str, MethodConfig]
) -> dict[str, dict[str, JsonValue]] | None:
    """What beside the trial's setting and the code decides its fitted scores; None without any."""
    if not scoring.any_fitted(scores):
        return None
    used = {n: fit_plan.settings_of(n, methods.values()) for n in scoring.with_parts(scores)}
    return {name: density_fields(config) for name, config in used.items() if config}


def search(
    scores: Sequence[str],
    plain: Tried,
    context: Context,
    features: Mapping[str, NDArray[np.float32]],
    config: PostHocConfig,
    local: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> dict[str, list[Setting]]:
    """Every setting of the fitted scores and of the sums among `scores`, and of their parts.

    A sum takes the parameters that validation chose for each of its parts alone.

    Args:
        scores: names, plain ones among them.
        plain: the settings of the plain scores and the plain parts.
        context: the head, and what is fitted to; scores that do not apply to it are left out.
        features: (N, D) of ID validation first, then of each validation OOD set.
        config: the search space.
        local: (N, P, D) local features of each set, for heads that take them.
    """
    inputs = [
        scoring.inputs_of(context.predictor, rows, local.get(name))
        for name, rows in features.items()
    ]
    tried: dict[str, list[Setting]] = {}
    for score in scoring.with_parts(scores):
        if (
            score in plain
            or score in (*scoring.COMPARING, *scoring.OWN_PASS)
            or not scoring.applies(score, context.predictor.head)
        ):
            continue
        settings = _settings(score, {**plain, **tried}, config, context)
        tried[score] = []
        for params, records in _fitted(score, settings, context):
            values = [scoring.score_rows(score, part, params, records).numpy() for part in inputs]
            tried[score].append(posthoc.judge(params, values))
    return tried


def _settings(
    score: str, tried: Tried, config: PostHocConfig, context: Context
) -> list[dict[str, float]]:
    if not scoring.is_sum(score):
        return posthoc.fitted_settings(score, config, num_train=len(context.data.features))
    chosen = {part: posthoc.best(tried[part]).params for part in scoring.parts(score)}
    return [scoring.joined_params(chosen)]


def _fitted(
    score: str, settings: Sequence[Mapping[str, float]], context: Context
) -> Iterator[tuple[Mapping[str, float], scoring.Records]]:
    """Each setting with what was fitted for it."""
    for params in settings:
        plan = fit_plan.plan(
            {score: params},
            method=context.method,
            methods=context.methods,
            seed=0,
            head="",
        )
        yield params, fit.fit_here(plan, context.data, context.storage, context.predictor)
