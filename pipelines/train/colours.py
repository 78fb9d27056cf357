"""Changes of colour with the formulas of torchvision: brightness, contrast, saturation, hue, grey.

Each takes images as uint8 (n, 3, H, W) and a factor an image, and rounds to uint8 as torchvision
does (`torchvision.transforms.functional.adjust_*` on tensors), so four changes in a row lose what
four calls there lose. All arithmetic is elementwise or on integers: the bytes of an image do not
depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.data.augmentation import Jitter
from pipelines.train.draws import Draws, Purpose

Planes = NDArray[np.uint8]  # (n, 3, H, W)
Floats = NDArray[np.float32]

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale


@dataclass(frozen=True)
class Changes:
    """What is done to the colours of N images.

    Attributes:
        factors: of brightness, contrast, saturation and hue, float32 (N, 4).
        order: the columns of `factors` in the order in which they are applied, int (N, 4).
        applied: whether to an image at all, bool (N,).
    """

    factors: Floats
    order: NDArray[np.intp]
    applied: NDArray[np.bool_]


def changes(draws: Draws, how: Jitter) -> Changes:
    """The changes of N images, drawn as torchvision's ColorJitter draws them.

    The order is drawn anew for each image: torchvision draws it for each call, which in training
    is an image.
    """
    spread = np.array(how.strengths)
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(middle - spread, [0.0, 0.0, 0.0, -0.5])
    units = draws.uniforms(Purpose.JITTER, 4)
    factors = low + units * (middle + spread - low)
    return Changes(
        factors=factors.astype(np.float32),
        order=np.argsort(draws.uniforms(Purpose.JITTER_ORDER, 4), axis=1, kind="stable"),
        applied=draws.uniforms(Purpose.JITTER_APPLIED, 1)[:, 0] < how.probability,
    )


def jittered(images: Planes, what: Changes, how: Jitter) -> Planes:
    """The images with their colours changed, uint8 (N, 3, H, W); a strength of 0 does nothing."""
    result = images.copy()
    for step in range(4):
        for column, change in enumerate(CHANGES):
            rows = np.flatnonzero(what.applied & (what.order[:, step] == column))
            if how.strengths[column] and len(rows):
                result[rows] = change(result[rows], what.factors[rows, column])
    return result


def grey(images: Planes) -> Planes:
    """The images without colour, uint8 (n, 1, H, W)."""
    red, green, blue = (images[:, channel].astype(np.float32) for channel in range(3))
    weights = [np.float32(weight) for weight in _LUMA]
    luma = weights[0] * red + weights[1] * green + weights[2] * blue
    levels: Planes = luma.astype(np.uint8)[:, None]
    return levels


def brighter(images: Planes, factors: Floats) -> Planes:
    """The images times their factors (n,)."""
    return _blended(images, np.float32(0), factors)


def contrasted(images: Planes, factors: Floats) -> Planes:
    """The images' distance from their mean grey times their factors (n,)."""
    greys = grey(images)
    # A sum of integers is the same in any order; of floats it is not.
    sums = greys.sum(axis=(1, 2, 3), dtype=np.int64, keepdims=True)
    return _blended(images, (sums / greys[0].size).astype(np.float32), factors)


def saturated(images: Planes, factors: Floats) -> Planes:
    """The images' distance from their own grey times their factors (n,)."""
    return _blended(images, grey(images).astype(np.float32), factors)


def hue_shifted(images: Planes, shifts: Floats) -> Planes:
    """The images with their hues turned by shares (n,) of the colour circle."""
    hue, saturation, value = _hsv(images.astype(np.float32) / np.float32(255))
    turned = np.mod(hue + shifts[:, None, None], np.float32(1))
    rgb = _rgb(turned, saturation, value)
    # As torchvision goes from [0, 1] to 256 levels of equal width.
    return (rgb * np.float32(256 - 1e-3)).astype(np.uint8)


CHANGES: tuple[Callable[[Planes, Floats], Planes], ...] = (
    brighter,
    contrasted,
    saturated,
    hue_shifted,
)


def _blended(images: Planes, others: Floats | np.float32, factors: Floats) -> Planes:
    """`factor * image + (1 - factor) * other`, cut to 0..255 and rounded down."""
    weights = factors[:, None, None, None]
    blend = weights * images.astype(np.float32) + (np.float32(1) - weights) * others
    return np.clip(blend, 0, 255).astype(np.uint8)


def _hsv(images: Floats) -> tuple[Floats, Floats, Floats]:
    """Hue, saturation and value in [0, 1], each (n, H, W), of RGB in [0, 1] (n, 3, H, W)."""
    red, green, blue = (images[:, channel] for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    is_grey = chroma == 0
    divisor = np.where(is_grey, np.float32(1), chroma)
    sixths = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(
            value == green,
            np.float32(2) + (blue - red) / divisor,
            np.float32(4) + (red - green) / divisor,
        ),
    )
    hue: Floats = np.mod(sixths / np.float32(6), np.float32(1))
    saturation: Floats = (chroma / np.where(is_grey, np.float32(1), value)).astype(np.float32)
    return hue, saturation, value


def _rgb(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """RGB in [0, 1] (n, 3, H, W) of hue, saturation and value (n, H, W)."""
    planes = []
    for offset in (5, 3, 1):
        place = np.mod(np.float32(offset) + np.float32(6) * hue, np.float32(6))
        away = np.clip(np.minimum(place, np.float32(4) - place), 0, 1)
        planes.append(value - value * saturation * away)
    return np.stack(planes, axis=1)
