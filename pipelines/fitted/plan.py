"""What is fitted to training features, and where it is found again: the plan without the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import digest
from pipelines.heads import Predictor
from pipelines.methods import METHODS, MethodConfig
from pipelines.methods.energy_models import density_fields
from pipelines.ood.statistics import ClassStatistics
from pipelines.records import Params
from pipelines.score import by_name as scoring
from pipelines.score.by_name import FITTED, OF_HEAD, TRAINED


@dataclass(frozen=True)
class FitData:
    """The training features that scores are fitted to.

    Attributes:
        features: (N, D), unit length; labels: (N,).
        statistics: of the features at unit length, merged from their shards.
        address: digest of the images, labels and features.
        local: (N, P, D) local features, where a head takes them.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    statistics: ClassStatistics
    address: str
    local: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ScoreFit:
    """A score to fit to training features: what decides its record, and so its address.

    Attributes:
        score: its name, a sum included.
        params: of the score (`knn`'s k, or those of a sum's parts).
        density: the settings of its method, where there is one of that name.
        seed: of a trained one; 0 for the others.
        head: the head's address, where the record reads the head.
        records: addresses of the records of a sum's parts, by name.
    """

    score: str
    params: Params
    density: MethodConfig | None = None
    seed: int = 0
    head: str | None = None
    records: tuple[tuple[str, str], ...] = ()

    def address(self, data: FitData, code: str) -> str:
        """Where the record lies below `cache/fitted/`.

        Args:
            data: what it is fitted to.
            code: the digest of the code that fits it (`pipelines.fitted.fit.fit_code`).
        """
        return digest(
            {
                "score": self.score,
                "params": dict(self.params),
                "density": None if self.density is None else density_fields(self.density),
                "seed": self.seed,
                "head": self.head,
                "records": list(self.records),
                "data": data.address,
                "code": code,
            }
        )


def plan(
    scores: Mapping[str, Params],
    *,
    method: MethodConfig,
    methods: Mapping[str, MethodConfig],
    seed: int,
    head: str,
    data: FitData,
) -> dict[str, Fit]:
    """What the `scores` of one head need fitted, by name, parts of sums first.

    Args:
        scores: parameters by name; of a sum, those of its parts with their names before them.
        method: the head's own; its settings come first for the score of its name.
        methods: of the run, whose settings come next; else the defaults.
        seed: of the head.
        head: its address.
        data: what is fitted to.
    """
    found: dict[str, Fit] = {}
    for score, params in scores.items():
        for name in scoring.records_needed(score):
            own = scoring.part_params(score, name, params)
            density = settings_of(name, (method, *methods.values()))
            if name not in FITTED:  # the sum itself, after its parts
                found[name] = Fit(score, params, head=head, records=_addresses(found, score, data))
            else:
                found[name] = Fit(
                    name,
                    own,
                    density,
                    seed if name in TRAINED else 0,
                    head if name in OF_HEAD else None,
                )
    return found


def settings_of(score: str, methods: Iterable[MethodConfig]) -> MethodConfig | None:
    """The settings that a density is fitted with: the first method of its name, or its defaults."""
    if score not in METHODS:
        return None
    defaults: MethodConfig = METHODS[score].Config()
    return next((method for method in methods if method.name == score), defaults)


def _addresses(found: Mapping[str, Fit], score: str, data: FitData) -> tuple[tuple[str, str], ...]:
    names = [name for name in scoring.parts(score) if name in found]
    return tuple((name, found[name].address(data)) for name in names)


def applies(score: str, predictor: Predictor) -> bool:
    """Whether a head has what the score reads: ViM needs a linear rule."""
    if not scoring.applies(score, predictor.head):
        return False
    return "vim" not in scoring.parts(score) or linear_rule(predictor) is not None


def linear_rule(
    predictor: Predictor,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
    """W (K, D) and b (K,) with logits = W z + b, or None where the head is not linear."""
    arrays, scale = predictor.arrays, np.float32(predictor.logit_scale)
    if set(arrays) == {"text_features"}:
        return arrays["text_features"] * scale, None
    if set(arrays) == {"weight", "bias"}:
        return arrays["weight"] * scale, arrays["bias"] * scale
    return None


@functools.lru_cache(maxsize=1)
def code_version() -> str:
    """A digest of the source that decides what fitting gives."""
    used = (density, energy_correction, energy_training, gaussians, statistics, scoring)
    sources = "\n".join(inspect.getsource(module) for module in used)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]
