"""Negative labels: words that are no class, against which images are compared.

Jiang et al. 2024, "Negative Label Guided OOD Detection with Pretrained Vision-Language Models",
section 3.1 (NegMining); Chen et al. 2024, "Conjugated Semantic Pool Improves OOD Detection with
Pre-trained Vision-Language Models". Words that are near by choice are chosen by another rule,
`all_but_names`. The score that uses them is `pipelines.ood.scores.neg_label`.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.ood.checks import Array, as_tensor, check_finite


@dataclass(frozen=True)
class NegativeLabels:
    """The chosen words: their unit text features (M, D), float32, the farthest first."""

    text_features: Tensor

    @cached_property
    def wide(self) -> npt.NDArray[np.float64]:
        """The text features in float64, as products take them: thousands are widened once."""
        return self.text_features.double().numpy()


# Words whose distances are computed at once: a block of a thousand classes takes 32 MB.
_BLOCK = 4096


def mine_negatives(
    words: Array,
    classes: Array,
    *,
    share: float = 0.15,
    percentile: float = 0.05,
    max_cosine: float = 1.0,
) -> Tensor:
    """Places of the words that are farthest from the classes, the farthest first.

    A word's distance is the `percentile` of minus its cosines with the classes: nearly the
    distance to the nearest class, robust to one odd class name. The `share` of words with the
    largest distance is kept, at least one; of equal distances the earlier word comes first. A
    word whose cosine with a class is above `max_cosine` counts as its name: it is the last to be
    kept.

    Args:
        words: (W, D) unit text features of the candidates.
        classes: (K, D) unit text features of the classes.
        share: of the candidates that is kept, in (0, 1]; 0.15 in the paper's public code.
        percentile: in [0, 1]; 0.05 in the paper. Linear interpolation between classes.
        max_cosine: in (0, 1]; 0.95 in the public code of Chen 2024, which alone has such a rule.

    Returns:
        (M,) int64, M = max(1, floor(share * W)).

    Raises:
        ValueError: no word, vectors of different sizes, or a share out of range.
    """
    candidates = as_tensor(words, "words", rank=2).double()
    known = as_tensor(classes, "classes", rank=2).double()
    if not len(candidates) or not len(known) or candidates.shape[1] != known.shape[1]:
        raise ValueError(
            f"words and classes need rows of one size, came {tuple(candidates.shape)} and "
            f"{tuple(known.shape)}"
        )
    if not (0 < share <= 1 and 0 <= percentile <= 1 and 0 < max_cosine <= 1):
        raise ValueError(
            "need 0 < share <= 1, 0 <= percentile <= 1 and 0 < max_cosine <= 1, came "
            f"{share}, {percentile} and {max_cosine}"
        )
    check_finite(candidates, "words")
    check_finite(known, "classes")
    distance = torch.cat(
        [_distance(part, known, percentile, max_cosine) for part in torch.split(candidates, _BLOCK)]
    )
    kept = max(1, math.floor(share * len(candidates)))
    return torch.sort(distance, descending=True, stable=True).indices[:kept]


def all_but_names(words: Array, classes: Array, *, max_cosine: float) -> Tensor:
    """Places of the words that name no class, the farthest first: for words that are to be near.

    The published mining keeps the farthest words, and would choose among the relatives of classes
    the least related. Here each word is kept whose cosine with every class is at most `max_cosine`.

    Args:
        words: (W, D) unit text features of the candidates.
        classes: (K, D) unit text features of the classes.
        max_cosine: in (0, 1).

    Returns:
        (M,) int64, M at most W; none where every word names a class.

    Raises:
        ValueError: no word, vectors of different sizes, or a bound out of range.
    """
    if not 0 < max_cosine < 1:
        raise ValueError(f"need 0 < max_cosine < 1, came {max_cosine}")
    order = mine_negatives(words, classes, share=1.0, max_cosine=max_cosine)
    candidates, known = (
        as_tensor(given, "features", rank=2).double() for given in (words, classes)
    )
    nearest = [(part @ known.T).amax(dim=1) for part in torch.split(candidates, _BLOCK)]
    return order[(torch.cat(nearest) <= max_cosine)[order]]


def _distance(words: Tensor, classes: Tensor, percentile: float, max_cosine: float) -> Tensor:
    cosines = words @ classes.T
    distance = torch.quantile(-cosines, percentile, dim=1)
    if max_cosine == 1:  # the cosine of a class with itself may be rounded to more
        return distance
    return torch.where(cosines.amax(dim=1) > max_cosine, -1.0, distance)
