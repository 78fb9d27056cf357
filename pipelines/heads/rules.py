"""Rules that several heads share: what a predictor makes of rows, and what it reads of settings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.heads.base import Arrays, LinearRule, Predictor, Settings, to_numpy


def text_predictor(
    head: str, text_features: Tensor, logit_scale: float, class_names: tuple[str, ...]
) -> Predictor:
    """A predictor whose rule is the product with fixed text features (K, D)."""
    arrays = {"text_features": to_numpy(text_features)}
    return Predictor(head, arrays, {}, logit_scale, class_names)


def text_rule(predictor: Predictor) -> LinearRule:
    """`linear` of a head whose similarities are products with fixed text features."""
    return predictor.arrays["text_features"] * np.float32(predictor.logit_scale), None


def weight_rule(predictor: Predictor) -> LinearRule:
    """`linear` of a head that holds W and b of its similarities."""
    arrays, scale = predictor.arrays, np.float32(predictor.logit_scale)
    return arrays["weight"] * scale, arrays["bias"] * scale


def weight_similarity(
    arrays: Arrays,
    settings: Settings,  # noqa: ARG001 - one signature for every head
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of such a head: W z + b."""
    product: NDArray[np.float64] = features @ arrays["weight"].T + arrays["bias"]
    return product


def text_similarity(
    arrays: Arrays,
    settings: Settings,  # noqa: ARG001 - one signature for every head
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of `text_predictor`."""
    product: NDArray[np.float64] = features @ arrays["text_features"].T
    return product


def number(settings: Settings, name: str) -> float:
    """A setting that is a number."""
    value = settings[name]
    assert isinstance(value, int | float), f"{name}: {value!r} is no number"
    return value


def numbers(settings: Settings, name: str) -> list[float]:
    """A setting that lists numbers."""
    value = settings[name]
    assert isinstance(value, list), f"{name}: {value!r} is no list"
    return value


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows (..., D) at unit length; those of a padded block are zero and stay so."""
    scaled: NDArray[np.float64] = rows / np.maximum(
        np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12
    )
    return scaled


def unchanged(
    arrays: Arrays,  # noqa: ARG001 - one signature for every head
    settings: Settings,  # noqa: ARG001
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`compared` of a head without an image adapter: the features as they are."""
    return features
