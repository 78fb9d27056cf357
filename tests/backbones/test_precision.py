"""`precision=auto`: bfloat16 where it was checked and the hardware has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelines.backbones import network, precision
from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.backbones.kinds import cifar
from pipelines.config import UserError
from pipelines.data.storage import Storage


@pytest.fixture
def config(tmp_path: Path) -> BackboneConfig:
    torch.manual_seed(0)
    safetensors.torch.save_file(
        cifar.NETWORKS["resnet20"](2).state_dict(), tmp_path / "w.safetensors"
    )
    return BackboneConfig(
        name="small",
        kind="cifar",
        model="resnet20",
        path=str(tmp_path / "w.safetensors"),
        class_names=["cat", "dog"],
        preprocessing=Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3)),
        precision="auto",
        bf16_checked=True,
    )


def resolved(config: BackboneConfig, place: Path, **changes: object) -> BackboneConfig:
    return network.resolve(config.model_copy(update=changes), Storage.open(str(place)))


@pytest.mark.parametrize(
    ("has", "checked", "chosen"),
    [
        ({"avx512_bf16": True}, True, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, True, "bf16"),
        ({"avx512_bf16": True}, False, "fp32"),
        ({"avx2": True}, True, "fp32"),
    ],
)
def test_auto_takes_what_was_checked_and_the_cpu_has(
    has: dict[str, bool], checked: bool, chosen: str,
    config: BackboneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    found = resolved(config, tmp_path, bf16_checked=checked)
    assert found.precision == chosen
    # Features have the address of that precision, however it was chosen.
    said = resolved(config, tmp_path, precision=chosen)
    assert network.identity(found) == network.identity(said)
    tower = network.load(found)
    assert tower.dtype == (torch.bfloat16 if chosen == "bf16" else torch.float32)


def test_what_is_said_stays(
    config: BackboneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda *_: pytest.fail("nobody asked"))
    for said in ("fp32", "bf16", "fp16"):
        assert resolved(config, tmp_path, precision=said).precision == said
    assert resolved(config, tmp_path, bf16_checked=False).precision == "fp32"


@pytest.mark.parametrize("native", [True, False])
def test_the_card_is_asked_where_the_tower_runs_on_one(
    native: bool, config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.settle(config, "cuda").precision == ("bf16" if native else "fp32")
    assert asked == [False]


def test_a_card_that_is_elsewhere_cannot_be_asked(
    config: BackboneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="precision=bf16 or fp32 decides"):
        precision.settle(config, "cuda")
