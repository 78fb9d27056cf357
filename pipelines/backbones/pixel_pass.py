"""What a pass over the pixels of images may give in place of their features.

Some scores judge something else than the features of an image as it is: its features after an
input step (`pipelines.backbones.input_step`), or the activations of the network's layers; and a
head may learn from augmented views (`pipelines.train.views`). Each is a pass of its own, whose
features are a cache entry of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pydantic import JsonValue
from torch import Tensor

from pipelines.backbones.tower import Tower
from pipelines.records import Record


class StepIdentity(Record):
    """What of an input step decides a feature; `record` is a digest of the score's numbers."""

    score: str
    record: str
    eps: int | float


class LayersIdentity(Record):
    """The layers, in order, and their channels."""

    layers: tuple[tuple[str, int], ...]


class ViewsIdentity(Record):
    """How many views of each image there are, and what is done to the image for each."""

    count: int
    augmentation: dict[str, JsonValue]


Identity: TypeAlias = StepIdentity | LayersIdentity | ViewsIdentity


class PixelPass(Protocol):
    """What a worker encodes batches of images by."""

    def identity(self) -> Identity:
        """The settings of the pass that decide what it gives, for the address."""

    def width(self, tower: Tower) -> int:
        """The length of what the pass gives of each image."""

    def encode(self, tower: Tower, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> float32 (N, `width`)."""


@dataclass(frozen=True)
class LayerPass:
    """The mean activations of some layers side by side (Lee et al. 2018, section 2.2).

    Attributes:
        places: in the network, in order, and their channels (`BackboneConfig.layers`).
    """

    places: Mapping[str, int]

    def identity(self) -> LayersIdentity:
        """The settings of the pass that decide what it gives, for the address."""
        return LayersIdentity(layers=tuple(self.places.items()))

    def width(self, tower: Tower) -> int:  # noqa: ARG002 - as every pass has it
        """The length of what the pass gives of each image."""
        return sum(self.places.values())

    def encode(self, tower: Tower, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> activations (N, W)."""
        return tower.layers(tower.normalize(pixels))
