"""Classes that are one text to the backbone are refused, before images are embedded if possible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.backbones.class_texts import refuse_equal_features, refuse_equal_prompts
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError, load
from pipelines.embed import own_images
from pipelines.embed.own_images import FolderJob

LONG = "a very long name of a class that goes on and on and on and on until nobody reads"


@pytest.fixture
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    architecture, weights = backbone_files["vit"]  # reads 16 tokens
    return BackboneConfig(name="tiny", config=str(architecture), path=str(weights))


def test_long_names_with_equal_first_tokens(backbone: BackboneConfig) -> None:
    names = ["cat", f"{LONG} one", "dog", f"{LONG} two"]
    with pytest.raises(UserError, match=r"the classes 'a very .* one' and 'a very .* two' are one"):
        refuse_equal_prompts(names, ["a photo of a {}."], backbone)
    refuse_equal_prompts([f"{number} {LONG}" for number in range(9)], ["{}"], backbone)


def test_equal_features_are_named_whatever_made_them() -> None:
    features = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float32), dim=1)
    refuse_equal_features(features, list("abcde"))
    features[4] = features[1] + 1e-8
    with pytest.raises(UserError, match="the classes 'b' and 'e' are one text"):
        refuse_equal_features(features, list("abcde"))


def test_your_own_images_with_such_names(
    pictures: Path, backbone: BackboneConfig, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(
        f"name: t\nconfig: {backbone.config}\npath: {backbone.path}\n"
    )
    for names, said in (((LONG + " a", LONG + " b"), "are one text"), (("One", "one"), "one name")):
        (tmp_path / "names.txt").write_text("\n".join(names))
        words = [
            f"source={pictures}",
            f"backbone=@{tmp_path / 'tiny.yaml'}",
            f"storage={tmp_path / 'storage'}",
            f"class_names={tmp_path / 'names.txt'}",
        ]
        with pytest.raises(UserError, match=said):
            own_images.run(load(FolderJob, "embed_folder", words))
    assert not (tmp_path / "storage" / "cache" / "features").exists()
