"""Every score by its name, also those that are fitted to training features first.

A score's name is one of `SCORES` (computed from similarities or logits), of `FITTED` (a record
fitted to the training features: KNN, SSD, the energy-correction model ...), or a sum of two or
more of them (`ScoreName`), each z-normalised by its mean and standard deviation over the whole
training set. `score_rows` computes any of them; what was fitted comes as `records` by name. A
sum's own record is a `Combination`, and its parts' records stand beside it.

Some scores read more than a head's similarities and the features, and are in no sum: `gl_mcm`
compares local features with the classes, `neg_label` and `neg_mcm` compare images with words that
are no class (the record of neg_label), and those of `OWN_PASS` have a pass over the pixels of
their own: images after an input step (`odin`), or the activations of layers (`layer_mahalanobis`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.input_step import InputStep
from pipelines.backbones.pixel_pass import LayerPass, PixelPass
from pipelines.config import UserError
from pipelines.heads import HEADS, Predictor
from pipelines.heads.comparisons import (
    global_similarity,
    local_similarity,
    negative_similarity,
)
from pipelines.ood import (
    FITTED_SCORES,
    SCORES,
    DifferentiableScore,
    EnergyCorrection,
    FeatureEBM,
    combine,
)
from pipelines.ood.checks import Array
from pipelines.ood.negatives import NegativeLabels
from pipelines.ood.records import FittedRecord, record_from_state, record_state
from pipelines.ood.table import Table
from pipelines.records import Params, ScoreName

# The record of a fitted score: it scores rows, or holds the words neg_label compares images with.
Fitted: TypeAlias = FittedRecord | NegativeLabels
Records: TypeAlias = Mapping[str, Fitted]

# Scores that need nothing but a head's similarities; others of SCORES are skipped here.
PLAIN = tuple(n for n, entry in SCORES.items() if entry.inputs in (("similarity",), ("logits",)))
# Scores that compare something else with text: local features with classes, images with words.
GL_MCM, NEG_LABEL = "gl_mcm", "neg_label"
_COMPARED = {"local_similarity", "negative_similarity"}
COMPARING = tuple(n for n, entry in SCORES.items() if _COMPARED & set(entry.inputs))
# Scores that have a pass over the pixels of their own.
OWN_PASS = tuple(name for name, row in FITTED_SCORES.items() if row.has_own_pass)
# Networks trained by SGLD; all other fitted scores have a closed form.
TRAINED: Table[type[Any]] = Table(
    {"energy_correction": EnergyCorrection, "feature_ebm": FeatureEBM}
)
FITTED: Table[type[Any]] = Table(
    {**{name: row.record for name, row in FITTED_SCORES.items()}, **TRAINED}
)


@dataclass(frozen=True, eq=False)
class Combination:
    """The sum of z-normalised scores; `mean` and `std` (M,) are those of the training set."""

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, scores: Tensor) -> Combination:
        """From the parts' scores (N, M) of the whole training set.

        Raises:
            ValueError: A part gives every training feature the same score.
        """
        std = scores.std(dim=0, correction=0)
        if not (std > 0).all():
            raise ValueError("a part of the sum is constant on the training features")
        return cls(scores.mean(dim=0), std)

    def __call__(self, scores: Array, /) -> Tensor:
        """Scores (N,) of the parts' scores (N, M)."""
        return combine(scores, self.mean, self.std)


@dataclass(frozen=True)
class Inputs:
    """What a score may read of N images: float64, but for the features as they are stored."""

    features: Tensor  # (N, D) unit length
    similarity: Tensor  # (N, K)
    logits: Tensor  # (N, K)
    # For the scores in COMPARING: the head, and local features (N, P, D), unit length, as stored.
    predictor: Predictor | None = None
    local: NDArray[np.float32] | None = None
    # By score of OWN_PASS: (N, W) what its pass over the pixels gave.
    passes: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def inputs_of(
    predictor: Predictor,
    features: Any,
    local: Any = None,
    passes: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> Inputs:
    """What every score reads of features (N, D) under a head.

    Args:
        predictor: the head.
        features: of N images.
        local: (N, P, D) their local features, where the head or a score reads them.
        passes: (N, W) what its own pass over the pixels gave, by score of OWN_PASS.
    """
    similarity = torch.from_numpy(predictor.similarity(features, local)).double()
    logits = similarity * predictor.logit_scale
    # A copy: arrays that Parquet hands out are read-only.
    return Inputs(torch.tensor(features), similarity, logits, predictor, local, passes)


def parts(score: str) -> tuple[str, ...]:
    """The scores that a sum is made of; any other score is its only part."""
    return ScoreName.parse(score).parts


def is_sum(score: str) -> bool:
    """Whether a score is a sum."""
    return ScoreName.parse(score).is_sum


def with_parts(scores: Iterable[str]) -> list[str]:
    """These scores and the parts of the sums among them, each once, parts first."""
    wanted = [name for score in scores for name in (*parts(score), score)]
    return list(dict.fromkeys(wanted))


def any_fitted(scores: Iterable[str]) -> bool:
    """Whether one of the scores is fitted to training features."""
    return any(records_needed(score) for score in scores)


def reads_local(scores: Iterable[str]) -> bool:
    """Whether one of the scores reads local features."""
    return GL_MCM in scores


def reads_words(scores: Iterable[str]) -> bool:
    """Whether one of the scores compares images with words that are no class."""
    return any("negative_similarity" in reads(score) for score in scores)


def reads(score: str) -> frozenset[str]:
    """The names of the arrays that a score reads, or the parts of a sum, to fit it or to score."""
    if is_sum(score):
        return frozenset().union(*map(reads, parts(score)))
    if score in SCORES:
        return frozenset(SCORES[score].inputs)
    return FITTED_SCORES[score].reads if score in FITTED_SCORES else frozenset({"features"})


def reads_head(score: str) -> bool:
    """Whether a fitted score's record depends on the head, not on the features alone."""
    return not reads(score) <= {"features", "perturbed_features", "layers"}


def reads_layers(scores: Iterable[str]) -> bool:
    """Whether one of the scores reads the activations of the backbone's layers."""
    return any("layers" in reads(score) for score in scores)


def needs_every_class(score: str) -> bool:
    """Whether a score is fitted to the training images of each class."""
    return any("labels" in FITTED_SCORES[n].inputs for n in parts(score) if n in FITTED_SCORES)


def applies(score: str, head: str) -> bool:
    """Whether a head of that name gives all that the score reads."""
    return reads(score) <= HEADS[head].gives


def part_params(score: str, part: str, params: Params) -> Params:
    """A part's parameters among those of the whole: `energy.tau` is `tau` of `energy`."""
    if score == part:
        return params
    start = f"{part}."
    return {k.removeprefix(start): v for k, v in params.items() if k.startswith(start)}


def joined_params(given: Mapping[str, Params]) -> dict[str, float]:
    """The parameters of a sum from those of its parts."""
    return {f"{part}.{key}": v for part, params in given.items() for key, v in params.items()}


def problem(score: str) -> str | None:
    """What is wrong with a score's name, or None."""
    name = ScoreName.parse(score)
    known = [*PLAIN, *(n for n in FITTED if n not in OWN_PASS)]
    if not name.is_sum:
        known += [*COMPARING, *OWN_PASS]
    unknown = [part for part in name.parts if part not in known]
    if unknown:
        example = ScoreName(parts=("energy", "knn"))
        return (
            f"no score {unknown[0]!r}{' in a sum' if name.is_sum else ''}; allowed: "
            f"{', '.join(known)}, sums of them such as {example}, all"
        )
    if len(set(name.parts)) < len(name.parts):
        return f"{score}: a sum needs different scores"
    return None


def records_needed(score: str) -> list[str]:
    """The names of the records that a score reads: its fitted parts, then itself if it is a sum."""
    name = ScoreName.parse(score)
    fitted = [part for part in name.parts if part in FITTED]
    return [*fitted, score] if name.is_sum else fitted


def records_read(score: str) -> list[str]:
    """The names of all records that a score reads: what is fitted, and mined words."""
    return [NEG_LABEL] if reads_words([score]) else records_needed(score)


def score_rows(score: str, inputs: Inputs, params: Params, records: Records) -> Tensor:
    """A score (N,) in float64, HIGH for in-distribution.

    Args:
        score: its name.
        inputs: of N images.
        params: its parameters; a fitted one's were used when it was fitted.
        records: what was fitted, by name: `records_read(score)`.
    """
    name = ScoreName.parse(score)
    if name.is_sum:
        columns = [
            score_rows(part, inputs, part_params(score, part, params), records)
            for part in name.parts
        ]
        return _scoring(records, score)(torch.stack(columns, dim=1))
    if score in COMPARING:
        return SCORES[score](**_compared(score, inputs, records), **params)
    if score in SCORES:
        return SCORES[score](similarity=inputs.similarity, logits=inputs.logits, **params).double()
    record = _scoring(records, score)
    if score in OWN_PASS:
        return record(_own_pass(score, inputs))
    scored = FITTED_SCORES[score].input if score in FITTED_SCORES else "features"
    return record(inputs.logits if scored == "logits" else inputs.features)


def _own_pass(score: str, inputs: Inputs) -> NDArray[np.float32]:
    """What the score's own pass over the pixels gave."""
    if score not in inputs.passes:
        raise UserError(
            f"score {score} needs a pass over the pixels of its own: give images, not features"
        )
    return inputs.passes[score]


def pixel_pass(score: str, params: Params, records: Records, backbone: BackboneConfig) -> PixelPass:
    """The pass over the pixels of a score of OWN_PASS.

    Args:
        score: its name.
        params: its parameters.
        records: what was fitted, by name.
        backbone: resolved; it names the layers that are read.
    """
    if FITTED_SCORES[score].input == "layers":
        return LayerPass(backbone.layers)
    eps = params.get("eps", FITTED_SCORES[score].settings["eps"])
    return InputStep(cast("DifferentiableScore", records[score]), eps)


def _scoring(records: Records, score: str) -> FittedRecord:
    """What was fitted for a score that is computed row by row."""
    record = records[score]
    assert not isinstance(record, NegativeLabels)
    return record


def negative_words(records: Records) -> NDArray[np.float64]:
    """The text features (M, D) of the mined words."""
    words = records[NEG_LABEL]
    assert isinstance(words, NegativeLabels)
    return words.wide


def compared_dtype(score: str) -> torch.dtype:
    """The type of the similarities that a score of COMPARING is given.

    neg_label takes float32: its result keeps the digits that matter, and a copy of the similarities
    to thousands of words would cost more than the score.
    """
    return torch.float32 if score == NEG_LABEL else torch.float64


def _compared(score: str, inputs: Inputs, records: Records) -> dict[str, Tensor]:
    """The similarities that a score of COMPARING reads, float64 where its type follows theirs."""
    assert inputs.predictor is not None
    features = inputs.features.numpy()
    if inputs.predictor.plugin.global_similarity is None:
        whole = inputs.similarity.float()  # float32 numbers in float64: nothing is rounded
    else:
        whole = torch.from_numpy(global_similarity(inputs.predictor, features))
    if score != GL_MCM:
        words = negative_words(records)
        negative = torch.from_numpy(negative_similarity(inputs.predictor, features, words))
        kind = compared_dtype(score)
        return {"similarity": whole.to(kind), "negative_similarity": negative.to(kind)}
    if inputs.local is None:
        raise UserError(
            f"score {GL_MCM} reads local features, and there are none: embed with "
            "embed.local_features=true, or give images"
        )
    local = torch.from_numpy(local_similarity(inputs.predictor, inputs.local))
    return {"similarity": whole.double(), "local_similarity": local}


def to_bytes(record: Fitted) -> bytes:
    """A record as the content of a safetensors file."""
    # Copies: a record may hold one tensor under two names, which the format refuses.
    state = {name: tensor.clone() for name, tensor in record_state(record).items()}
    return bytes(safetensors.torch.save(state))


def from_bytes(name: str, content: bytes) -> Fitted:
    """The record of the score `name` that `to_bytes` wrote; its scores are identical."""
    state = safetensors.torch.load(content)
    if is_sum(name):
        return Combination(**state)
    if name == NEG_LABEL:
        return record_from_state(NegativeLabels, state)
    fitted: FittedRecord = record_from_state(FITTED[name], state)
    return fitted
