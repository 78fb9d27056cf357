"""The section `augmentation`: how training images of whole networks are changed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config import Section

Range = tuple[float, float]


class Jitter(Section):
    """How far colours are changed, as torchvision's ColorJitter does; 0 leaves one alone."""

    brightness: float = Field(0, ge=0, description="factors from max(0, 1 - this) to 1 + this")
    contrast: float = Field(0, ge=0, description="as brightness")
    saturation: float = Field(0, ge=0, description="as brightness")
    hue: float = Field(
        0, ge=0, le=0.5, description="shifts from -this to this, as shares of the colour circle"
    )
    probability: float = Field(0.8, ge=0, le=1, description="share of the images it is applied to")

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """Those of brightness, contrast, saturation and hue."""
        return self.brightness, self.contrast, self.saturation, self.hue


class Augmentation(Section):
    """How training images are changed, anew in each epoch and view: crop, flip, colours."""

    crop: Literal["none", "pad_crop", "resized_crop"] = Field(
        "none",
        description="pad_crop: a window of the image's size out of the image with a black border; "
        "resized_crop: a random part of the image, resized",
    )
    pad: int = Field(4, ge=0, description="width of the border of pad_crop in pixels")
    size: int | None = Field(
        None, ge=1, description="side in pixels of what resized_crop gives; default: the image's"
    )
    scale: Range = Field((0.08, 1.0), description="area of a resized crop, as shares of the image")
    ratio: Range = Field((3 / 4, 4 / 3), description="width over height of a resized crop")
    flip: bool = Field(False, description="mirror an image left to right with probability 1/2")
    jitter: Jitter = Field(Jitter(), description="changes of colour")
    grey: float = Field(0, ge=0, le=1, description="share of the images that lose their colour")

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"{value[0]:g} to {value[1]:g}: give two numbers, 0 < first <= second")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> Augmentation:
        if self.scale[1] > 1:
            raise ValueError(f"scale up to {self.scale[1]:g}: a crop is at most the image, 1")
        if self.size is not None and self.crop != "resized_crop":
            raise ValueError(f"size={self.size}: crop={self.crop} resizes nothing; leave it out")
        return self
