"""What a trained head makes of patches, and of words that are no class.

A head's file takes part with one more function beside `similarity`:

    compared(arrays, settings, features) -> (..., D)
        The unit features that are compared with text: `base.unchanged`, or what an adapter makes
        of them. The head's arrays then hold the classes' `text_features` (K, D).

A head whose patches have prompts of their own (GalLoP) also gives

    global_similarity(arrays, settings, features) -> (N, K)
    local_similarity(arrays, settings, local) -> (N, P, K)

Other heads (a linear probe, a cache of training features) have no cosine with a word, and the
scores that need one do not apply to them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.heads.base import Predictor

# Arrays of a head that has learned its own negative prompts (M, D): they stand for the words.
OWN_NEGATIVES = "negative_text_features"


def compares(head: str) -> bool:
    """Whether the head of that name compares features with text, patches and words included."""
    return hasattr(importlib.import_module(f"pipelines.heads.{head}"), "compared")


def global_similarity(predictor: Predictor, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarities (N, K) of whole images (N, D), without what a head adds from their patches."""
    rule = getattr(predictor.module, "global_similarity", predictor.module.similarity)
    return predictor.in_blocks(rule, (len(predictor.class_names),), features)


def local_similarity(predictor: Predictor, local: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarities (N, P, K) of patches (N, P, D) of unit length."""
    rule = getattr(predictor.module, "local_similarity", _text_similarity(predictor.module))
    return predictor.in_blocks(rule, (local.shape[1], len(predictor.class_names)), local)


def negative_similarity(
    predictor: Predictor, features: NDArray[np.float32], negatives: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Similarities (N, M) of images (N, D) with negatives (M, D), or with the head's own."""
    own = predictor.arrays.get(OWN_NEGATIVES, negatives)
    text = own.astype(np.float64).T
    module = predictor.module

    def rule(
        arrays: Mapping[str, NDArray[np.float64]],
        settings: Mapping[str, Any],
        rows: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        product: NDArray[np.float64] = module.compared(arrays, settings, rows) @ text
        return product

    return predictor.in_blocks(rule, (len(own),), features)


def _text_similarity(module: Any) -> Any:
    """The classes' text features against whatever the head compares them with."""

    def rule(
        arrays: Mapping[str, NDArray[np.float64]],
        settings: Mapping[str, Any],
        rows: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        product: NDArray[np.float64] = (
            module.compared(arrays, settings, rows) @ arrays["text_features"].T
        )
        return product

    return rule
