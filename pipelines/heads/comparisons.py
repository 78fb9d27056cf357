"""What a trained head makes of local features, and of words that are no class.

Heads say in their record (`HeadPlugin`) what is compared with text: `compared`, and where whole
images or local features have prompts of their own (GalLoP), `global_similarity` and
`local_similarity`. A head without `compared` has no cosine with a word, and the scores that need
one do not apply to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.heads.base import Arrays, Predictor, Rule, Settings

# Array of a head that has learned negative prompts (M, D): they stand for the words.
LEARNED_NEGATIVES = "negative_text_features"


def global_similarity(predictor: Predictor, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarities (N, K) of whole images (N, D), without what a head adds from local features.

    Of M prompts a class (N, M K), as `HeadPlugin.similarity` has it; so do local features.
    """
    rule = predictor.plugin.global_similarity or predictor.plugin.similarity
    return predictor.in_blocks(rule, features)


def local_similarity(predictor: Predictor, local: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarities (N, P, K) of local features (N, P, D) of unit length."""
    rule = predictor.plugin.local_similarity or _text_similarity(_compared(predictor))
    return predictor.in_blocks(rule, local)


def negative_similarity(
    predictor: Predictor, features: NDArray[np.float32], negatives: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Similarities (N, M) of images (N, D) with negatives (M, D), or with learned ones."""
    learned = predictor.arrays.get(LEARNED_NEGATIVES, negatives)
    text, compared = learned.astype(np.float64, copy=False).T, _compared(predictor)

    def rule(arrays: Arrays, settings: Settings, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        product: NDArray[np.float64] = compared(arrays, settings, rows) @ text
        return product

    return predictor.in_blocks(rule, features)


def _compared(predictor: Predictor) -> Rule:
    compared = predictor.plugin.compared
    assert compared is not None, (
        f"{predictor.head} compares nothing with text; see `HeadPlugin.gives`"
    )
    return compared


def _text_similarity(compared: Rule) -> Rule:
    """The classes' text features against whatever the head compares them with."""

    def rule(arrays: Arrays, settings: Settings, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        product: NDArray[np.float64] = compared(arrays, settings, rows) @ arrays["text_features"].T
        return product

    return rule
