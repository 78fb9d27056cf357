"""Encoded bytes to RGB pixels, or a reason why not.

Every image becomes 8-bit RGB before anything else sees it: 16-bit grey is scaled (not clipped),
transparency is laid over a background, CMYK and palettes are converted, of an animation the
first frame counts. open_clip's own transform converts after resizing, which resizes a palette
image without interpolation and drops transparency; for grey and RGB the two orders agree.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageColor,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pipelines.data.limits import LIMITS

# Only formats whose decoders neither run other programs nor read other files. Pillow knows a
# plugin once it is imported; naming those here leaves the others (PostScript, ...) out.
FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
    GifImagePlugin.GifImageFile.format,
    BmpImagePlugin.BmpImageFile.format,
    TiffImagePlugin.TiffImageFile.format,
)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Rejected(Exception):
    """An image that cannot be used: a reason to count by, and a message to read."""

    def __init__(self, reason: str, message: str) -> None:
        """Keep both apart; `reason` is one of a few words, `message` is free text."""
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Decoding:
    """How bytes become pixels.

    Attributes:
        background: colour under transparent pixels, a CSS name or #rrggbb.
        exif: `apply` turns the image as its EXIF orientation says; `ignore`, as open_clip does.
        max_pixels: images of more pixels (width x height) are rejected before decoding.
        lossless_to: images whose short side is at most this many pixels have to be stored
            losslessly; 0: none. What compression leaves in an image is gone after a resize to
            less, but not in one that a network sees pixel by pixel.
    """

    background: str = "white"
    exif: Literal["ignore", "apply"] = "ignore"
    max_pixels: int = LIMITS.pixels
    lossless_to: int = 0


DEFAULT = Decoding()


def decode(content: bytes, how: Decoding = DEFAULT) -> Image.Image:
    """The image in `content` as 8-bit RGB.

    Raises:
        Rejected: `empty`, `not_an_image`, `too_large`, `lossy`, `truncated`, `unsupported` or
            `unreadable`.
    """
    if not content:
        raise Rejected("empty", "no bytes")
    if len(content) > LIMITS.image_bytes:
        raise Rejected("too_large", f"{len(content):,} bytes, over {LIMITS.image_bytes:,}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > how.max_pixels:
                raise Rejected("too_large", f"{width} x {height} pixels, over {how.max_pixels}")
            if min(width, height) <= how.lossless_to and _is_lossy(image, content):
                raise Rejected(
                    "lossy",
                    f"{image.format} of {width} x {height} pixels: the backbone learned from "
                    "lossless images of this size; give such, or embed.lossless=false",
                )
            image.load()
            turned = ImageOps.exif_transpose(image) if how.exif == "apply" else image
            return _to_rgb(turned, how.background)
    except Rejected:
        raise
    except UnidentifiedImageError:
        start = content[:8].hex(" ")
        raise Rejected("not_an_image", f"{len(content)} bytes starting {start}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too_large", str(error)) from None
    except MemoryError:
        raise Rejected("too_large", "not enough memory to decode") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error ...
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise Rejected(reason, f"{type(error).__name__}: {error}") from None


def _is_lossy(image: Image.Image, content: bytes) -> bool:
    """Whether the stored image is not the one that was saved."""
    if image.format == WebPImagePlugin.WebPImageFile.format:
        return b"VP8L" not in content  # the chunk of a lossless picture
    in_tiff = str(image.info.get("compression", "")) in ("jpeg", "tiff_jpeg")
    return image.format == JpegImagePlugin.JpegImageFile.format or in_tiff


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode.startswith(("I", "F")):
        image = _scale_to_8_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        base = Image.new("RGBA", rgba.size, (*ImageColor.getrgb(background)[:3], 255))
        image = Image.alpha_composite(base, rgba)
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: 0 stays 0 and 65535 becomes 255.

    Raises:
        Rejected: for floating-point or wider integer pixels, whose white is not known.
    """
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise Rejected("unsupported", f"pixels of mode {image.mode} outside 0..65535")
    return Image.fromarray(np.rint(values.astype(np.float64) / 257).astype(np.uint8))
