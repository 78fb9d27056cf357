"""Classes and scores of image features under one trained head, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.backbones.threads import torch_threads
from pipelines.heads import Predictor
from pipelines.score.by_name import GL_MCM, Inputs, Records, inputs_of, score_rows

# Rows of a block of scores; a multiple of every vector length, so none leaves a remainder.
BLOCK_ROWS = 256
# Float32 leaves 1e-6; a copy in half precision, 1e-2 at most.
LENGTH_TOLERANCE = 1e-2


def judge(
    predictor: Predictor,
    scores: Mapping[str, Mapping[str, float]],
    features: NDArray[np.float32],
    records: Records = MappingProxyType({}),
    local: NDArray[np.float32] | None = None,
    passes: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    temperature: float = 1.0,
) -> dict[str, NDArray[Any]]:
    """Classes and scores of image features.

    A row's result has the same bits whatever batch it comes in: the registered model gives the
    numbers of the scores table.

    Args:
        predictor: the trained head.
        scores: parameters (tau, c ...) by name of the score; higher scores are more ID.
        features: (N, D), of unit length where the head compares them.
        records: what was fitted for these scores, by name (`pipelines.score.by_name`).
        local: (N, P, D) local features, unit length, where the head or a score reads them.
        passes: (N, W) what its own pass over the pixels gave, by score of `OWN_PASS`.
        temperature: of the confidence alone (`pipelines.ood.calibration`).

    Returns:
        `predicted` int64 (N,), `confidence` float64 (N,), the largest softmax probability of the
        logits, and `score_NAME` float64 (N,) for each score. Class and confidence are those of
        the adjusted logits where the head was trained on a long tail; scores never are.

    Raises:
        ValueError: where `features` is no matrix, or a row is not finite or not of the length that
            the head takes.
        UserError: where local features, or those after a step, are read and there are none.
    """
    _check(features, is_unit=predictor.plugin.takes_unit)
    inputs = inputs_of(predictor, features, local, passes)
    adjusted = replace(inputs, logits=predictor.adjusted(inputs.logits))
    # Work cut by threads is cut where a row may lie; blocks are small, so threads gain nothing.
    with torch_threads(1):
        return {
            "predicted": adjusted.logits.argmax(dim=1).numpy(),
            "confidence": _score("msp", adjusted, {"tau": temperature}, records),
            **{f"score_{n}": _score(n, inputs, p, records) for n, p in scores.items()},
        }


def _check(features: NDArray[np.float32], *, is_unit: bool) -> None:
    if features.ndim != 2:
        raise ValueError(f"features must be a matrix (N, D), came shape {features.shape}")
    if not is_unit:
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values")
        return
    lengths = np.linalg.norm(features, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < LENGTH_TOLERANCE))  # also catches NaN
    if len(bad):
        raise ValueError(
            f"features must have unit length: {len(bad)} of {len(lengths)} rows have not, the "
            f"first is row {bad[0]} (counted from 0) of length {lengths[bad[0]]:g}"
        )


def _score(
    name: str, inputs: Inputs, params: Mapping[str, float], records: Records
) -> NDArray[np.float64]:
    """One score (N,) in blocks of `BLOCK_ROWS`, the last one padded.

    Vector instructions and the scalar code for what they leave over differ in the last bit (in
    DeltaEnergy's logaddexp, for one). In full blocks no row is left over.
    """
    result = np.empty(len(inputs.similarity))
    for start in range(0, len(result), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = Inputs(
            _padded(inputs.features[rows]),
            _padded(inputs.similarity[rows]),
            _padded(inputs.logits[rows]),
            predictor=inputs.predictor,
            # Local features are large: only for the score that reads them.
            local=_padded_array(inputs.local, rows) if name == GL_MCM else None,
            passes=_padded_arrays(inputs.passes, name, rows),
        )
        scores = score_rows(name, block, params, records)
        result[rows] = scores.numpy()[: len(result) - start]
    return result


def _padded(block: torch.Tensor) -> torch.Tensor:
    """The block filled up with its first row, which is as fit to be scored as any."""
    missing = BLOCK_ROWS - len(block)
    return torch.cat([block, block[:1].expand(missing, -1)]) if missing else block


def _padded_array(values: NDArray[np.float32] | None, rows: slice) -> NDArray[np.float32] | None:
    """The same for an array (N, ...), where there is one."""
    if values is None:
        return None
    block = values[rows]
    return np.concatenate([block, np.repeat(block[:1], BLOCK_ROWS - len(block), axis=0)])


def _padded_arrays(
    passes: Mapping[str, NDArray[np.float32]], score: str, rows: slice
) -> dict[str, NDArray[np.float32]]:
    """The features after that score's input step, where it takes one."""
    block = _padded_array(passes.get(score), rows)
    return {} if block is None else {score: block}
