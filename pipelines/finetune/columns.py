"""Arrays with a row for each image beside its feature, loaded only where a method asks for them.

A head's or a method's `Config` names them in `columns`:

    local_features    (N, P, D) float32, unit length: one for each region of the
                      image, from the features on disk (embed.local_features)
    domains           (N,) int64: the number of each training image's domain among the training
                      domains in alphabetical order, from the sources' column `domain`

Training images get all that is asked for. Validation images and outliers get local features
where a head takes them, because it cannot predict without; no head predicts from a domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from pipelines.data.feature_sets import FeatureSets
from pipelines.finetune.data import TrainingData, columns_of
from pipelines.heads.base import LOCAL
from pipelines.methods import MethodConfig

DOMAINS = "domains"


def fill(
    data: TrainingData, sets: FeatureSets, methods: Iterable[MethodConfig] = ()
) -> TrainingData:
    """`data` with the arrays that `methods` and their heads ask for.

    Args:
        data: the training images' features and so on, from `sets`.
        sets: a view that may open the training sets.
        methods: what is to be trained.

    Raises:
        UserError: where the images were embedded without local features, or a training source
            names no domain.
    """
    methods = list(methods)
    asked = {name for method in methods for name in columns_of(method)}
    taken = {name for method in methods for name in method.head.columns}
    columns: dict[str, NDArray[Any]] = {}
    if LOCAL in asked:
        columns[LOCAL] = sets.column("train", LOCAL)
    if DOMAINS in asked:
        columns[DOMAINS] = sets.domains("train")
    return replace(
        data,
        columns=columns,
        validation_columns=_local_of(sets, "validation") if LOCAL in taken else {},
        outlier_columns=_local_of(sets, "outliers")
        if any(LOCAL in m.head.columns and m.needs_outliers for m in methods)
        else {},
    )


def _local_of(sets: FeatureSets, name: str) -> Mapping[str, NDArray[Any]]:
    return {LOCAL: sets.column(name, LOCAL)} if name in sets.benchmark.sets else {}
