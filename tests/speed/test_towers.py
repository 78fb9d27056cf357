"""The suite that compares ways of running a tower, on a small network."""

from __future__ import annotations

import re

import pytest
from torch import nn

from pipelines.config import UserError
from pipelines.speed import towers
from pipelines.speed.towers import PLAIN, Network


def small() -> nn.Module:
    convolution = nn.Conv2d(3, 8, 3, bias=False)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, towers.Row]:
    """By way: of a small network, without the compiler, which takes a minute."""
    monkeypatch.setattr(towers, "NETWORKS", {"small": Network(small, 16, batch=4)})
    ways = {way: make for way, make in towers.WAYS.items() if "compile" not in way}
    monkeypatch.setattr(towers, "WAYS", ways)
    monkeypatch.setattr(towers, "NEEDS", towers.NEEDS | {"onnxruntime": ("no_such_module",)})
    measured = towers.run(scale=0.5, only="SMALL")
    assert len(measured) == len(ways)
    return {re.split(r"threads: |small, ", row.name)[-1]: row for row in measured}


def test_every_way_is_measured_against_the_plain_loop_or_says_why_not(rows) -> None:
    assert set(rows) == set(towers.WAYS)
    assert rows[PLAIN].ratio == pytest.approx(1.0)
    assert rows["onnxruntime"].ratio is None
    assert rows["onnxruntime"].note == "not measured: no_such_module not installed"
    for way in (PLAIN, "channels last", "channels last, normalisation folded"):
        (distance,) = re.findall(r"relative distance at most (\S+),", rows[way].note)
        assert float(distance) < 1e-5, way
    (distance,) = re.findall(r"relative distance at most (\S+),", rows["bfloat16 weights"].note)
    assert 1e-5 < float(distance) < 0.1


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"only=alexnet: no such network; allowed: ViT-B-32, Res"):
        towers.run(only="alexnet")
