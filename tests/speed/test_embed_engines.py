"""The parts of suite=embed_engines that take no minutes."""

from pathlib import Path

import pytest

from pipelines.backbones import network
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.speed import embed_engines, towers


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match="only=vgg: no such network; allowed: ViT-B-32, ResNet-50"):
        embed_engines.run(only="vgg")


def test_both_sides_run_the_same_networks_and_ways() -> None:
    assert set(embed_engines.NETWORKS) == set(towers.NETWORKS)
    assert {way for ways in embed_engines.AGAINST.values() for way in ways} <= set(towers.WAYS)


def test_a_networks_backbone_takes_images_of_the_bare_loops_size(tmp_path: Path) -> None:
    config = embed_engines.NETWORKS["EfficientNet-Lite0"].make(tmp_path)
    tower = network.load(network.resolve(config, Storage.open(str(tmp_path))))
    assert tower.image_size == (towers.NETWORKS["EfficientNet-Lite0"].size,) * 2
