"""What `python -m jobs.embed source=FOLDER` does beside the images: names, prompts, ODIN."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from pipelines.backbones import network
from pipelines.backbones.kinds import cifar
from pipelines.config import ConfigError, UserError, load
from pipelines.embed import own_images
from pipelines.embed import stage as embed
from pipelines.embed.own_images import FolderJob
from pipelines.embed.workers import ShardEncoder, ShardReceipt, Work


@pytest.fixture
def words(
    backbone_files: dict[str, tuple[Path, Path]],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The words of a job whose shards are made in this process."""

    def in_this_process(rows: list, plans: dict, work: Work, _layout: object) -> object:
        actor = ShardEncoder(work, {name: plan.source for name, plan in plans.items()})
        for row in rows:
            (receipt,) = actor(row.table())["receipt"].to_pylist()
            yield ShardReceipt.model_validate_json(receipt)

    monkeypatch.setattr(embed, "_encode_shards", in_this_process)
    architecture, weights = backbone_files["vit"]
    (tmp_path / "names.txt").write_text("cat\n\n  red dog \n")
    (tmp_path / "prompts.txt").write_text("a {}.\nthe {}!\n")
    (tmp_path / "tiny.yaml").write_text(f"name: t\nconfig: {architecture}\npath: {weights}\n")
    return [
        f"source={pictures}",
        f"backbone=@{tmp_path / 'tiny.yaml'}",
        f"storage={tmp_path / 'storage'}",
        f"class_names={tmp_path / 'names.txt'}",
    ]


def test_text_features_of_names_and_prompts_are_kept(words: list[str], tmp_path: Path) -> None:
    config = load(FolderJob, "embed_folder", [*words, f"templates={tmp_path / 'prompts.txt'}"])
    done = own_images.run(config)
    assert done.cache.manifest.rows == 30
    loaded = network.load(config.backbone)
    assert done.text is not None
    for row, name in zip(done.text, ("cat", "red dog"), strict=True):
        texts = [f"a {name}.", f"the {name}!"]
        mean = np.mean([loaded.encode_text([text])[0].numpy() for text in texts], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
    kept = list((tmp_path / "storage" / "cache" / "text").iterdir())
    assert len(kept) == 1
    own_images.run(config)
    own_images.run(load(FolderJob, "embed_folder", [*words, "templates=imagenet7"]))
    assert len(list(kept[0].parent.iterdir())) == 2


def test_odin_makes_features_of_its_own(words: list[str]) -> None:
    plain = own_images.run(load(FolderJob, "embed_folder", words))
    moved = own_images.run(load(FolderJob, "embed_folder", [*words, "odin.eps=0.01"]))
    again = own_images.run(load(FolderJob, "embed_folder", [*words, "odin.eps=0.01"]))
    assert moved.cache.address == again.cache.address != plain.cache.address
    keys = plain.cache.keys().to_pylist()
    assert np.abs(plain.cache.load(keys) - moved.cache.load(keys)).max() > 1e-4
    assert moved.cache.manifest.about["pixel_pass"]["score"] == "ODIN"


def test_mistakes(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "no_place.txt").write_text("a photo\n")
    for more, message in (
        (f"class_names={tmp_path / 'none.txt'}", r"none.txt: not readable as text"),
        (f"class_names={tmp_path / 'blank.txt'}", "no line in it"),
        ("templates=imagenet8", "no such file; or one of simple, plain, imagenet7, imagenet80"),
        (f"templates={tmp_path / 'no_place.txt'}", "write {} once"),
    ):
        with pytest.raises(UserError, match=message):
            own_images.run(load(FolderJob, "embed_folder", [*words, more]))
    with pytest.raises(ConfigError, match="give class_names=FILE too"):
        load(FolderJob, "embed_folder", [*words[:3], "odin.tau=10"])


def test_a_network_for_small_images_refuses_lossy_ones_unless_told(
    words: list[str], tmp_path: Path
) -> None:
    network_of = cifar.NETWORKS["resnet20"](2)
    safetensors.torch.save_file(network_of.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "small.yaml").write_text(
        f"name: small\nkind: cifar\nmodel: resnet20\npath: {tmp_path}/weights.safetensors\n"
        "class_names: [cat, dog]\npreprocessing: {size: 32, lossless: true, mean: [0, 0, 0], "
        "std: [1, 1, 1]}\n"
    )
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg", quality=95)
    (storage,) = (word for word in words if word.startswith("storage="))
    mine = [f"source={tmp_path}/images", f"backbone=@{tmp_path}/small.yaml", storage]
    with pytest.raises(UserError, match=r"4 of 4 images.*4 lossy.*embed\.lossless=false"):
        own_images.run(load(FolderJob, "embed_folder", mine))
    told = own_images.run(load(FolderJob, "embed_folder", [*mine, "embed.lossless=false"]))
    assert told.cache.manifest.rows == 4
