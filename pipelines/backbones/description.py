"""Which backbone: its configuration, and the hash of its weights. Nothing here imports torch.

What a configuration's kind makes of it stands in `pipelines.backbones.kinds`, one file a kind, and
is reached by `pipelines.backbones.network`. There are no random weights: no file, no model.
"""

from __future__ import annotations

import functools
import hashlib
import pkgutil
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from pipelines.config import Section

# What the training of a network starts from: the backbone's weights, or weights that are drawn.
Start = Literal["backbone", "random"]
Precision = Literal["fp32", "bf16", "fp16", "auto"]
# The kinds by the names of their files: listed, not imported.
KINDS = tuple(
    sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent / "kinds")]))
)


class Preprocessing(Section):
    """How an image becomes the pixels that a network was trained on."""

    size: int = Field(ge=1, description="side of the square image, pixels")
    resize: int | None = Field(
        None, ge=1, description="short side before the centre crop; none: size"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="of the resize")
    mean: tuple[float, float, float] = Field(description="of each channel, of pixels in [0, 1]")
    std: tuple[float, float, float] = Field(description="of each channel")
    lossless: bool = Field(
        False, description="it learned from lossless images of this size: refuse lossy ones"
    )


class BackboneConfig(Section):
    """Which network: its kind, an architecture, and a file or a published tag of weights."""

    name: str = Field(description="the name in messages and tables")
    kind: str = Field("open_clip", description=f"one of {', '.join(KINDS)}")
    model: str | None = Field(None, description="architecture, by its name in the kind's library")
    pretrained: str | None = Field(None, description="open_clip's tag of the weights")
    config: str | None = Field(None, description="JSON file of an architecture, in place of model")
    path: str | None = Field(None, description="local weights: safetensors, or a state dict")
    untrained: bool = Field(
        False, description="there are no weights: every method of the run trains them from scratch"
    )
    preprocessing: Preprocessing | None = Field(
        None, description="of an image classifier; a vision-language model brings its own"
    )
    class_names: list[str] | str | None = Field(
        None,
        description="the classes of an image classifier's last layer, in its order: names, a "
        "file with a name a line or a JSON list, or FILE#KEY",
    )
    layers: dict[str, int] = Field(
        {},
        description="of an image classifier: places in the network, in its order, and their "
        "channels, whose mean activations layer_mahalanobis reads",
    )
    rename: dict[str, str] = Field(
        {}, description="parameters of the file under other names: regular expression to name"
    )
    precision: Precision = Field(
        "fp32",
        description="numbers of the image tower; auto: bf16 where bf16_checked, and the hardware "
        "computes in it, else fp32",
    )
    bf16_checked: bool = Field(
        False, description="bf16 moved the AUROC of no score by 0.1 point (figure=precision)"
    )
    about: str = Field("", description="where the weights come from; shown where they are missing")

    @property
    def lossless_to(self) -> int:
        """The largest side, in pixels, of images that have to be stored losslessly; 0: none."""
        how = self.preprocessing
        return how.size if how is not None and how.lossless else 0

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"no kind {kind!r}; allowed: {', '.join(KINDS)}")
        return kind


def file_hash(path: str) -> str:
    """The SHA-256 of a file, remembered until the file changes."""
    stat = Path(path).stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _file_hash(path: str, *_stamp: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing(config: BackboneConfig, what: str) -> str:
    """What to say where a file of a backbone is not there."""
    files = "backbone.path=FILE" + (" backbone.config=FILE" if config.config else "")
    about = f" ({config.about})" if config.about else ""
    return f"backbone {config.name}: {what}; give local weights by {files}{about}"
