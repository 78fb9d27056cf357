"""How much one image, or one table of images, may take: the same in every job that reads images.

Sizes are looked at before anything is read, unpacked or decoded.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is refused by its size.

    Attributes:
        pixels: width x height of an image. Pillow's own bound: above it Pillow warns, above twice
            it Pillow refuses.
        image_bytes: one encoded image in a file, a tar member or a Parquet cell; as much as
            `pixels` take in RGB without any compression.
        table_bytes: the names and classes of one source (a CSV file, the columns of a Parquet
            file once unpacked), and a file that a web server sends only as a whole.
        header_bytes: what a tar archive says of one member.
        text_bytes: a list of names in a text or JSON file.
    """

    pixels: int = 89_478_485
    image_bytes: int = 2**28
    table_bytes: int = 2**30
    header_bytes: int = 2**20
    text_bytes: int = 2**26


LIMITS = Limits()


def refuse_bytes(size: int, limit: int) -> None:
    """Raise OSError (EFBIG) where `size` bytes are more than `limit`."""
    if size > limit:
        raise OSError(errno.EFBIG, f"{size:,} bytes, over {limit:,}")
