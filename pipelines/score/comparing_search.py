"""The search over gl_mcm, neg_label and neg_mcm, which read more of a head than its similarities.

The same number of settings as every other score; the same judgement (`pipelines.score.search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.feature_sets import FeatureSet, FeatureSets
from pipelines.heads import Predictor
from pipelines.heads.base import BLOCK_ROWS, LOCAL
from pipelines.heads.comparisons import global_similarity, local_similarity, negative_similarity
from pipelines.methods import MethodConfig
from pipelines.ood import SCORES
from pipelines.score import by_name as scoring
from pipelines.score import search as posthoc
from pipelines.score.by_name import GL_MCM, Records
from pipelines.score.config import PostHocConfig
from pipelines.score.search import Setting

Table = list[NDArray[np.float64]]


@dataclass(frozen=True)
class Validation:
    """The images of one validation set: (N, D) features, and (N, P, D) local ones where read."""

    features: NDArray[np.float32]
    local: NDArray[np.float32] | None = None


def local_features(
    view: FeatureSets,
    names: Sequence[str],
    methods: Mapping[str, MethodConfig],
    scores: Sequence[str],
) -> dict[str, NDArray[np.float32]]:
    """Local features of these sets, where a head or a score reads them; else nothing."""
    heads = any(LOCAL in method.head.columns for method in methods.values())
    if not heads and not scoring.reads_local(scores):
        return {}
    return {name: view.column(name, LOCAL) for name in names}


def search(
    scores: Sequence[str],
    predictor: Predictor,
    sets: Sequence[FeatureSet],
    local: Mapping[str, NDArray[np.float32]],
    records: Records,
    config: PostHocConfig,
) -> dict[str, list[Setting]]:
    """Every setting of gl_mcm, neg_label and neg_mcm among `scores`, where they apply to the head.

    Args:
        scores: names, others among them.
        predictor: the head.
        sets: ID validation first, then each validation OOD set.
        local: local features (N, P, D) of each set, by name.
        records: the mined words, where a score reads them.
        config: the search space.
    """
    parts = [Validation(s.features, local.get(s.name)) for s in sets]
    return {
        score: _search(score, predictor, parts, records, config)
        for score in scoring.COMPARING
        if score in scores and scoring.applies(score, predictor.head)
    }


def _search(
    score: str,
    predictor: Predictor,
    parts: Sequence[Validation],
    records: Records,
    config: PostHocConfig,
) -> list[Setting]:
    tried = posthoc.settings(
        score,
        config,
        num_classes=len(predictor.class_names),
        logit_scale=predictor.logit_scale,
    )
    tables = [
        _gl_mcm(predictor, part, tried)
        if score == GL_MCM
        else _with_words(score, predictor, part, tried, records)
        for part in parts
    ]
    return [
        posthoc.judge(params, [table[number] for table in tables])
        for number, params in enumerate(tried)
    ]


def _with_words(
    score: str,
    predictor: Predictor,
    part: Validation,
    tried: Sequence[Mapping[str, float]],
    records: Records,
) -> Table:
    words = scoring.negative_words(records)
    kind = scoring.compared_dtype(score)
    whole = torch.from_numpy(global_similarity(predictor, part.features)).to(kind)
    negative = torch.from_numpy(negative_similarity(predictor, part.features, words)).to(kind)
    return [
        SCORES[score](similarity=whole, negative_similarity=negative, **params).numpy()
        for params in tried
    ]


def _gl_mcm(predictor: Predictor, part: Validation, tried: Sequence[Mapping[str, float]]) -> Table:
    """Block by block: similarities of local features are never held for all images at once.

    A setting's score is MCM + weight x MCM of the best local feature; each temperature is computed
    once for all weights.
    """
    if part.local is None:
        raise ValueError("gl_mcm needs local features")
    taus = sorted({params["tau"] for params in tried})
    whole, best = (np.empty((len(taus), len(part.features))) for _ in range(2))
    for start in range(0, len(part.features), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        images = _exact(global_similarity(predictor, part.features[rows]))
        local = _exact(local_similarity(predictor, part.local[rows]))
        for place, tau in enumerate(taus):
            whole[place, rows] = SCORES["mcm"](similarity=images, tau=tau).numpy()
            each = SCORES["mcm"](similarity=local.flatten(0, 1), tau=tau)
            best[place, rows] = each.reshape(local.shape[:2]).amax(dim=1).numpy()
    return [
        whole[taus.index(params["tau"])] + params["weight"] * best[taus.index(params["tau"])]
        for params in tried
    ]


def _exact(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(array).double()
