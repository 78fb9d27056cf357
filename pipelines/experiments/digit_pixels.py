"""Digits as small vectors, for experiments that need real data and no vision-language model."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.data import digits


def pixels(classes: Iterable[int], part: str, style: str = "plain") -> tuple[Tensor, Tensor]:
    """Grey values of one part of the stored split, averaged to 8 x 8.

    Args:
        classes: Digits wanted.
        part: train, validation or test.
        style: One of `pipelines.data.digits.STYLES`; rows stand in the same order in each.

    Returns:
        Pixels (N, 64) in [0, 1], float64, and digits (N,).
    """
    wanted, labels, parts = set(classes), digits.labels(), digits.split()
    rows = [i for i, label in enumerate(labels) if label in wanted and parts[i] == part]
    images = digits.DigitsSource().read([f"digits/{row:04d}/{style}" for row in rows])
    vectors = np.stack([_vector(image) for image in images])
    return torch.from_numpy(vectors), torch.from_numpy(labels[rows])


def _vector(image: bytes | Exception) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if isinstance(image, Exception):
        raise image
    small = Image.open(io.BytesIO(image)).convert("L").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel() / 255
