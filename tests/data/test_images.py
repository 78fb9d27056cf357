import io

import numpy as np
import pytest
from PIL import Image

from pipelines.data.images import Decoding, Rejected, decode

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_rgb_comes_back_unchanged(kind: str) -> None:
    content = encoded(Image.fromarray(RGB), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(np.asarray(decode(content)), RGB)


def test_jpeg_has_the_pixels_pillow_gives() -> None:
    content = encoded(Image.fromarray(RGB), "JPEG")
    assert np.array_equal(np.asarray(decode(content)), np.asarray(Image.open(io.BytesIO(content))))


def test_grey_is_the_same_in_all_channels() -> None:
    pixels = np.asarray(decode(encoded(Image.fromarray(RGB[..., 0]), "PNG")))
    assert np.array_equal(pixels, np.repeat(RGB[..., :1], 3, axis=2))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(values), "PNG")))
    expected = [round(int(value) / 257) for value in values.reshape(-1)]
    assert pixels[..., 0].reshape(-1).tolist() == expected


def test_cmyk_jpeg_is_close_to_its_original() -> None:
    smooth = Image.fromarray(RGB).resize((60, 40), Image.Resampling.BICUBIC)
    content = encoded(smooth.convert("CMYK"), "JPEG", quality=100)
    difference = np.asarray(decode(content)).astype(int) - np.asarray(smooth).astype(int)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize(("colour", "value"), [("white", 255), ("#000000", 0), ("grey", 128)])
def test_transparent_pixels_show_the_background(colour: str, value: int) -> None:
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10] = 255
    alpha[10] = 51  # one fifth of the image's own colour
    content = encoded(Image.fromarray(np.concatenate([RGB, alpha], axis=2)), "PNG")
    pixels = np.asarray(decode(content, Decoding(background=colour))).astype(int)
    assert np.array_equal(pixels[:10], RGB[:10])
    assert (pixels[11:] == value).all()
    assert np.abs(pixels[10] - (0.2 * RGB[10] + 0.8 * value)).max() <= 1


def test_transparent_palette_entry_shows_the_background() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    pixels = np.asarray(decode(encoded(image, "PNG", transparency=1), Decoding("blue")))
    assert pixels.tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(content))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored_or_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    content = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(content)), RGB)
    turned = np.asarray(decode(content, Decoding(exif="apply")))
    assert np.array_equal(turned, np.rot90(RGB, k=-1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "not_an_image"),
        (encoded(Image.fromarray(RGB), "JPEG")[:200], "truncated"),
        (encoded(Image.fromarray(RGB), "PNG")[:300], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not_an_image"),
        (encoded(Image.fromarray(RGB.astype(np.float32)[..., 0]), "TIFF"), "unsupported"),
    ],
)
def test_bad_bytes_give_their_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        decode(content)
    assert caught.value.reason == reason
    assert caught.value.message


def test_large_images_are_rejected_before_decoding() -> None:
    header = encoded(Image.new("1", (20_000, 20_000)), "PNG")  # 50 kB that would be 1.2 GB
    for how in (Decoding(), Decoding(max_pixels=1000)):
        with pytest.raises(Rejected) as caught:
            decode(header, how)
        assert caught.value.reason == "too_large"
    with pytest.raises(Rejected, match="30 x 20 pixels, over 599"):
        decode(encoded(Image.fromarray(RGB), "PNG"), Decoding(max_pixels=599))


@pytest.mark.parametrize(
    ("form", "options", "is_lossy"),
    [
        ("JPEG", {"quality": 100}, True),
        ("WEBP", {"quality": 90}, True),
        ("WEBP", {"lossless": True}, False),
        ("TIFF", {"compression": "jpeg"}, True),
        ("TIFF", {"compression": "tiff_lzw"}, False),
        ("PNG", {}, False),
        ("BMP", {}, False),
    ],
)
def test_lossy_images_of_a_networks_own_size_are_rejected_where_it_asks(
    form: str, options: dict, is_lossy: bool
) -> None:
    content = encoded(Image.fromarray(RGB), form, **options)
    for side in (20, 32):
        if is_lossy:
            with pytest.raises(Rejected, match=r"30 x 20 pixels.*embed\.lossless=false") as caught:
                decode(content, Decoding(lossless_to=side))
            assert caught.value.reason == "lossy"
        else:
            assert decode(content, Decoding(lossless_to=side)).size == (30, 20)
    assert decode(content, Decoding(lossless_to=19)).size == (30, 20)  # it is made smaller
    assert decode(content).size == (30, 20)
