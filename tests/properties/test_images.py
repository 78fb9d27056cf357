"""Any bytes as an image: 8-bit RGB pixels, or a reason to count by; in time."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.images import Decoding, Rejected, decode
from tests.properties.profiles import both

REASONS = {"empty", "not_an_image", "too_large", "truncated", "unsupported", "unreadable"}
SMALL = Decoding(max_pixels=1_000_000)


def decodes_or_says_why(content: bytes) -> None:
    for how in (SMALL, Decoding(background="#102030", exif="apply", max_pixels=1_000_000)):
        try:
            image = decode(content, how)
        except Rejected as rejected:
            reason, message = rejected.reason, rejected.message
        else:
            assert image.mode == "RGB"
            pixels = np.asarray(image)
            assert pixels.dtype == np.uint8
            assert pixels.shape == (image.height, image.width, 3)
            assert image.width * image.height <= SMALL.max_pixels
            continue
        assert reason in REASONS
        assert message


def encoded(form: str, mode: str, size: tuple[int, int] = (9, 7), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def png(width: int, height: int, data: bytes, *extra: bytes, depth: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", head), *extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


WHOLE = [
    encoded("PNG", "RGB"),
    encoded("PNG", "P"),
    encoded("PNG", "1"),
    encoded("PNG", "L"),
    encoded("JPEG", "RGB"),
    encoded("JPEG", "CMYK"),
    encoded("JPEG", "L", progressive=True),
    encoded("GIF", "P"),
    encoded("BMP", "RGB"),
    encoded("TIFF", "RGB"),
    encoded("TIFF", "F"),
    encoded("TIFF", "CMYK", compression="tiff_lzw"),
    encoded("WEBP", "RGB"),
]
KINDS = [
    *WHOLE,
    *[content[: len(content) // 2] for content in WHOLE],
    *[content[:20] for content in WHOLE],
    *[content + b"more" for content in WHOLE],
    b"",
    b"\x00",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n(id) (w) file\n",
    b"P6 100000 100000 255\n",
    png(40_000, 40_000, zlib.compress(b"")),
    png(2**31 - 1, 2**31 - 1, b""),
    png(0, 0, b""),
    png(1000, 1000, zlib.compress(b"\0" * 3_001_000)),
    png(1000, 1000, zlib.compress(b"\0" * 50_000_000)),
    png(
        3, 3, zlib.compress(b"\0" * 30), png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**7))
    ),
    png(3, 3, zlib.compress(b"\0" * 30), png_chunk(b"iCCP", b"a\0\0" + b"\xff" * 50)),
    png(3, 3, zlib.compress(b"\0" * 30), png_chunk(b"eXIf", b"Exif\0\0II*\0" + b"\xff" * 60)),
    png(3, 3, zlib.compress(b"\0" * 30), depth=3),
    b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf7\0\0" + b"\0" * 768,
    b"BM" + struct.pack("<IHHIIiiHHI", 70, 0, 0, 54, 40, -3, -(2**31), 1, 24, 0) + b"\0" * 24,
    b"II*\0" + struct.pack("<I", 8) + b"\xff\xff" * 40,
    b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBPVP8 " + b"\xff" * 30,
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A whole image with some bytes replaced, cut out, or doubled."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        until = min(len(content), at + draw(st.integers(0, 8)))
        content[at:until] = draw(st.binary(max_size=8))
        if not content:
            break
    return bytes(content)


test_bytes, test_bytes_long = both(
    decodes_or_says_why, st.one_of(damaged(), st.binary(max_size=300)), KINDS, short=300, long=20000
)
