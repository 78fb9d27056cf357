"""A method may train a network of its own beside the backbone of the run."""

from __future__ import annotations

import pytest

from pipelines.config import ConfigError, load
from pipelines.methods import training_setting
from pipelines.settings.config import PipelineConfig, open_checked

DEMO = ("preset=demo",)
OWN = "methods.small_network.head.train.backbone"


def test_its_name_stands_for_its_file() -> None:
    own = load(PipelineConfig, "pipeline", DEMO).methods["small_network"].network
    assert own is not None
    assert own.backbone is not None
    assert (own.backbone.kind, own.backbone.model) == ("cifar", "resnet8")
    changed = load(PipelineConfig, "pipeline", [*DEMO, f"{OWN}.model=resnet20"])
    how = changed.methods["small_network"].network
    assert how is not None
    assert how.backbone is not None
    assert how.backbone.model == "resnet20"


def test_its_name_on_the_command_line_stands_for_its_file() -> None:
    how = load(PipelineConfig, "pipeline", [*DEMO, f"{OWN}=resnet20"]).methods["small_network"]
    assert how.network is not None
    assert how.network.backbone is not None
    assert how.network.backbone.model == "resnet20"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((f"{OWN}=resnet9",), "no such backbone"),
        (
            (f"{OWN}.untrained=false", "methods.small_network.head.train.start=backbone"),
            "are missing",
        ),
        ((f"{OWN}=mini",), "needs an image classifier, and backbone 'mini'"),
        (("methods.small_network.head.train.start=backbone",), "has no weights"),
        (
            ("methods.small_network_energy.head.train.backbone=resnet20",),
            "it starts from small_network and so has that one's architecture",
        ),
    ],
)
def test_what_does_not_fit_is_said(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_checked(load(PipelineConfig, "pipeline", [*DEMO, *words]))


def test_the_place_of_a_file_decides_no_network() -> None:
    settings = [
        training_setting(
            load(PipelineConfig, "pipeline", [*DEMO, f"{OWN}.about={text}"]).methods[
                "small_network"
            ]
        )
        for text in ("one", "other")
    ]
    assert settings[0] == settings[1]
