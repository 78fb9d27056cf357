"""The section `embed`: how images become features. It needs no torch, as every section of a run."""

from __future__ import annotations

from typing import Literal, TypeAlias

from PIL import ImageColor
from pydantic import Field, field_validator

from pipelines.config import Section
from pipelines.data import images
from pipelines.data.augmentation import Augmentation
from pipelines.data.limits import LIMITS

Engine: TypeAlias = Literal["torch", "onnxruntime"]


class EmbedConfig(Section):
    """How images become features."""

    batch_size: int = Field(64, ge=1, description="images encoded at once; the last is padded")
    shard_rows: int = Field(1024, ge=1, description="images of one output file, one unit of work")
    max_rejected: float = Field(0.05, ge=0, le=1, description="share of bad images to put up with")
    background: str = Field("white", description="colour under transparent pixels")
    exif: Literal["ignore", "apply"] = Field(
        "ignore", description="apply turns images as their EXIF orientation says"
    )
    max_pixels: int = Field(
        LIMITS.pixels, ge=1, le=LIMITS.pixels, description="larger images are rejected"
    )
    lossless: bool = Field(
        True,
        description="refuse lossy images of a network's own size, where it says that it learned "
        "from lossless ones (backbone.preprocessing.lossless)",
    )
    local_features: bool = Field(False, description="keep local features too (GL-MCM, LoCoOp)")
    views: int = Field(
        0,
        ge=0,
        description="augmented views of each training image, of which every epoch of a head takes "
        "another one; 0: heads learn from the images as they are",
    )
    augmentation: Augmentation = Field(
        Augmentation(crop="resized_crop", flip=True), description="what is done for each view"
    )
    engine: Engine = Field(
        "torch",
        description="what runs the image tower; onnxruntime, an extra, is the faster one for "
        "convolutions on a CPU",
    )
    decode: Literal["auto", "actors", "tasks"] = Field(
        "auto",
        description="where images are decoded: in the encoding actors, or in separate tasks "
        "on any CPU; auto: in tasks where the actors have GPUs",
    )

    @field_validator("background")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        ImageColor.getrgb(value)  # raises ValueError
        return value

    def decoding(self, lossless_to: int = 0) -> images.Decoding:
        """The part that decides how bytes become pixels.

        Args:
            lossless_to: the backbone's (`BackboneConfig.lossless_to`).
        """
        asked = lossless_to if self.lossless else 0
        return images.Decoding(self.background, self.exif, self.max_pixels, asked)
