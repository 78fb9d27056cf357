"""Real photographs, as they are and in the formats that the web holds beside plain JPEG."""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.data.images import Decoding, decode


@pytest.fixture(scope="module")
def photos(shared: Path) -> dict[str, list[bytes]]:
    """The photographs' bytes by Pillow's mode: most are RGB, a few grey."""
    found: dict[str, list[bytes]] = {}
    for path in sorted((shared / "data" / "photos").glob("*.JPEG")):
        content = path.read_bytes()
        found.setdefault(Image.open(io.BytesIO(content)).mode, []).append(content)
    assert {mode: len(group) for mode, group in found.items()} == {"RGB": 60, "L": 6}
    return found


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: bytes, how: Decoding | None = None) -> np.ndarray:
    return np.asarray(decode(content, how or Decoding())).astype(int)


def test_grey_and_colour_features_are_open_clips_own(
    photos: dict[str, list[bytes]], shared: Path
) -> None:
    contents: list[bytes | Exception] = [*photos["L"], *photos["RGB"][:10]]
    files = shared / "models" / "mini-rn-64.json", shared / "models" / "mini-rn-64.safetensors"
    config = BackboneConfig(name="mini_rn_64", config=str(files[0]), path=str(files[1]))
    loaded = network.load(config)
    names = [str(number) for number in range(len(contents))]
    encoded = Encoder(loaded, 16).encode(Preparer(loaded.crop).batches(names, contents, 16))
    model = open_clip.CLIP(**json.loads(files[0].read_text())).eval()
    model.load_state_dict(load_file(files[1]))
    transform = open_clip.image_transform(64, is_train=False)
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(io.BytesIO(c))) for c in contents])
        expected = model.encode_image(batch, normalize=True).numpy()
    np.testing.assert_allclose(encoded.columns["feature"], expected, rtol=0, atol=1e-5)


def test_a_photograph_in_every_format_is_the_same_picture(photos: dict[str, list[bytes]]) -> None:
    image = Image.open(io.BytesIO(photos["RGB"][0])).convert("RGB")
    plain = np.asarray(image).astype(int)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert np.array_equal(pixels(saved(image, kind, **options)), plain)
    near = {
        "CMYK JPEG": saved(image.convert("CMYK"), "JPEG", quality=98),
        "WebP": saved(image, "WEBP", quality=95),
        "GIF": saved(image.quantize(256), "GIF"),
    }
    for name, content in near.items():
        assert np.abs(pixels(content) - plain).mean() < 8, name


def test_a_16_bit_photograph_is_scaled_not_clipped(photos: dict[str, list[bytes]]) -> None:
    grey = np.asarray(Image.open(io.BytesIO(photos["L"][0])))
    deep = grey.astype(np.uint16) * 257  # 255 becomes 65535
    found = pixels(saved(Image.fromarray(deep), "PNG"))
    assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))


def test_a_cut_out_photograph_lies_on_the_background(photos: dict[str, list[bytes]]) -> None:
    image = Image.open(io.BytesIO(photos["RGB"][1])).convert("RGB")
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, image.width, image.height // 2))
    cut = image.copy()
    cut.putalpha(mask)
    found = pixels(saved(cut, "PNG"), Decoding(background="#102030"))
    half = image.height // 2
    assert np.array_equal(found[:half], np.asarray(image)[:half])
    assert (found[half:] == [0x10, 0x20, 0x30]).all()
