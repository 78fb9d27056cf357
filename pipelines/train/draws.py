"""Random numbers of an image: a function of what they are for, and of nothing drawn before them.

The generator is counter-based: the numbers of an image follow from the seed, the epoch, the view,
the purpose and the image's id alone. So they are the same on whichever worker, in whatever batch
and in whatever order the image is met.

It is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) with the constants of Vigna's `splitmix64.c`: every image has a stream of its own, whose
start is a mix of its id with the seed, the epoch, the view and the purpose.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15
_TO_UNIT = 2.0**-53  # a float64 holds the upper 53 bits

Ids = NDArray[np.uint64]


class Purpose(IntEnum):
    """What random numbers are for; the values are part of every result."""

    CROP = 1
    FLIP = 2
    JITTER = 3
    JITTER_ORDER = 4
    JITTER_APPLIED = 5
    GREY = 6


@dataclass(frozen=True)
class Draws:
    """The random numbers of N images in one epoch and view.

    Attributes:
        ids: of the images, uint64 (N,).
        seed: of the training.
        epoch: a number.
        view: a number, where an image is seen several times in an epoch.
    """

    ids: Ids
    seed: int
    epoch: int
    view: int = 0

    def uniforms(self, purpose: Purpose, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1) for each image, float64 (N, count); see `uniforms`."""
        return uniforms(
            self.ids,
            seed=self.seed,
            epoch=self.epoch,
            view=self.view,
            purpose=purpose,
            count=count,
        )


def uniforms(
    ids: Ids, *, seed: int, epoch: int, view: int, purpose: int, count: int
) -> NDArray[np.float64]:
    """Uniform random numbers in [0, 1), float64 (N, count), of images of these ids.

    Args:
        ids: uint64 (N,).
        seed: any integer, of which 64 bits count, as of the next three.
        epoch: numbers of two epochs are independent, and so for `view` and `purpose`.
        view: see `epoch`.
        purpose: see `Purpose`.
        count: numbers of an image; the first ones do not depend on it.
    """
    starts = mix(ids ^ _key(seed, epoch, view, int(purpose)))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    bits = mix(starts[:, None] + steps) >> np.uint64(11)
    units: NDArray[np.float64] = bits.astype(np.float64) * _TO_UNIT
    return units


def mix(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64: a bijection of 64 bits, of an array of any shape."""
    mixed = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _key(*parts: int) -> np.uint64:
    """Numbers as one: each is mixed with all before it, so their order counts."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix((state ^ np.uint64(part % 2**64)) + np.uint64(GAMMA))
    key: np.uint64 = state[0]
    return key
