"""What is fitted to training features for the scores of a head: the plan without the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.methods import METHODS, MethodConfig
from pipelines.ood.statistics import ClassStatistics
from pipelines.records import Params
from pipelines.score import by_name as scoring
from pipelines.score.by_name import FITTED, TRAINED


@dataclass(frozen=True)
class FitData:
    """The training features that scores are fitted to.

    Attributes:
        features: (N, D), unit length; labels: (N,).
        statistics: of the features at unit length, merged from their shards.
        address: digest of the images, labels and features.
        local: (N, P, D) local features, where a head takes them.
        layers: (N, W) activations of the backbone's layers, where a score reads them.
        layer_sizes: the channels of each layer.
        layers_address: of the layers' features.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    statistics: ClassStatistics
    address: str
    local: NDArray[np.float32] | None = None
    layers: NDArray[np.float32] | None = None
    layer_sizes: tuple[int, ...] = ()
    layers_address: str = ""


@dataclass(frozen=True)
class ScoreFit:
    """A score to fit to training features.

    Attributes:
        score: its name, a sum included.
        params: of the score (`knn`'s k, or those of a sum's parts).
        density: the settings of its method, where there is one of that name.
        seed: of a trained one; 0 for the others.
        head: the head's address, where the record reads the head.
        parts: of a sum, those of its parts that are fitted.
    """

    score: str
    params: Params
    density: MethodConfig | None = None
    seed: int = 0
    head: str | None = None
    parts: tuple[ScoreFit, ...] = ()


def plan(
    scores: Mapping[str, Params],
    *,
    method: MethodConfig,
    methods: Mapping[str, MethodConfig],
    seed: int,
    head: str,
) -> dict[str, ScoreFit]:
    """What the `scores` of one head need fitted, by name, parts of sums first.

    Args:
        scores: parameters by name; of a sum, those of its parts with their names before them.
        method: the head's; its settings come first for the score of its name.
        methods: of the run, whose settings come next; else the defaults.
        seed: of the head.
        head: its address.
    """
    fits: dict[str, ScoreFit] = {}
    for score, params in scores.items():
        for name in scoring.records_needed(score):
            of_part = scoring.part_params(score, name, params)
            density = settings_of(name, (method, *methods.values()))
            if name not in FITTED:  # the sum itself, after its parts
                parts = tuple(fits[part] for part in scoring.parts(score) if part in fits)
                fits[name] = ScoreFit(score, params, head=head, parts=parts)
            else:
                fits[name] = ScoreFit(
                    name,
                    of_part,
                    density,
                    seed if name in TRAINED else 0,
                    head if scoring.reads_head(name) else None,
                )
    return fits


def settings_of(score: str, methods: Iterable[MethodConfig]) -> MethodConfig | None:
    """The settings that a density is fitted with: the first method of its name, or its defaults."""
    if score not in METHODS:
        return None
    defaults: MethodConfig = METHODS[score].Config()
    return next((method for method in methods if method.name == score), defaults)
