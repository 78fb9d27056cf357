"""Maps of an image's patches under a trained head: each place's own score.

A map covers what the backbone sees of an image, its evaluation crop, row by row from the upper
left. It exists where the head compares features with text and the backbone gives local features
of more than one place (`pipelines.backbones.local`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.heads import Predictor
from pipelines.heads.comparisons import local_similarity
from pipelines.ood.patches import PATCH_SCORES, patch_scores
from pipelines.records import Params

# What a map shows where the score of the image has no value for a patch.
FALLBACK = "mcm"


@dataclass(frozen=True, eq=False)
class PatchMap:
    """The scores of an image's places.

    Attributes:
        score: what was computed of each place.
        values: (rows, columns), HIGH where the place is like a known class.
        crop: (H, W, 3) what the backbone sees, 8-bit RGB.
    """

    score: str
    values: NDArray[np.float64]
    crop: NDArray[np.uint8]

    @property
    def caption(self) -> str:
        """What the map shows, and its range, in a line."""
        rows, columns = self.values.shape
        low, high = self.values.min(), self.values.max()
        return f"{self.score} of {rows} x {columns} patches, {low:.4g} to {high:.4g}"


def why_no_map(predictor: Predictor, num_local: Callable[[], int]) -> str | None:
    """Why a head has no maps; None where it has.

    Args:
        predictor: the head.
        num_local: gives the number of local features of an image; asked only where it matters.
    """
    if predictor.plugin.compared is None:
        return f"head {predictor.head} compares no feature with text"
    if num_local() < 2:
        return "the backbone gives one local feature an image, which is no map"
    return None


def patch_maps(
    predictor: Predictor,
    score: str,
    params: Params,
    local: NDArray[np.float32],
    crops: Sequence[NDArray[np.uint8]],
) -> list[PatchMap]:
    """The maps of several images; one by one they would take as long each.

    Args:
        predictor: the head; `why_no_map` gives None.
        score: that judges images. Each place has it too, where it is one of `PATCH_SCORES`; else
            MCM at its default.
        params: its parameters.
        local: (N, P, D) unit local features of the images.
        crops: (H, W, 3) each image as the backbone sees it.
    """
    name = PATCH_SCORES.get(score, FALLBACK)
    # GL-MCM's weight is of the sum, not of a patch.
    kept = {k: v for k, v in params.items() if k != "weight"} if score in PATCH_SCORES else {}
    similarity = torch.from_numpy(local_similarity(predictor, local)).double()
    scores = patch_scores(similarity, name, logit_scale=predictor.logit_scale, **kept).numpy()
    return [
        PatchMap(name, values.reshape(grid(len(values), crop.shape[:2])), crop)
        for values, crop in zip(scores, crops, strict=True)
    ]


def grid(num_local: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the places of an image of (height, width) pixels.

    Raises:
        ValueError: where that many places fill no grid of the image's proportions.
    """
    height, width = size
    rows = max(1, round(math.sqrt(num_local * height / width)))
    if num_local % rows:
        raise ValueError(f"{num_local} places fill no grid of an image of {height} x {width}")
    return rows, num_local // rows
