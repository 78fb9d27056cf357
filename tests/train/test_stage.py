"""The stage of networks: what decides an address, what is found again, what is made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.backbones import network
from pipelines.backbones.classifier import ImageClassifier
from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.methods.base import TrainingConfig
from pipelines.train import cache
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.stage import train
from tests.train.toy import NAMES, InMemory, job

TRAINING = TrainingConfig(epochs=2, batch_size=8, outlier_batch_size=4, warmup_epochs=0)
NEW = BackboneConfig(
    name="new", kind="cifar", model="resnet20", untrained=True,
    preprocessing=Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
)  # fmt: skip
WORK = replace(job("outlier_exposure", TRAINING), backbone=NEW)


def pictures(count: int, seed: int) -> InMemory:
    rng = np.random.default_rng(seed)
    return InMemory(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def small_data() -> NetworkData:
    return NetworkData(
        class_names=NAMES,
        images=pictures(12, 0),
        labels=np.arange(12) % 3,
        validation=pictures(6, 1),
        validation_labels=np.arange(6) % 3,
        outliers=pictures(5, 2),
        address="small",
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "outputs"))


def trained(storage: Storage, *jobs: NetworkJob, **more: Any) -> list[str]:
    return train(jobs, small_data(), storage, compute=ComputeConfig(), mode="in_process", **more)


def test_a_trained_network_is_a_backbone_like_any_other(storage: Storage) -> None:
    (place,) = trained(storage, WORK)
    backbone = cache.trained_backbone(NEW, place, storage, "exposure/0")
    tower = network.load(network.resolve(backbone, storage))
    assert isinstance(tower, ImageClassifier)
    assert tower.class_names == NAMES
    some = pictures(4, 9).read(np.arange(4))
    features = tower.features(tower.normalize(some)).numpy()
    # The same weights in the architecture alone.
    plain = network.trainable(backbone, NAMES, "backbone", 0).eval()
    with torch.no_grad():
        _, logits = plain(some)
    ours = features @ tower.weight.T + tower.bias
    assert ours == pytest.approx(logits.numpy(), rel=1e-4, abs=1e-5)


def test_what_is_there_is_found_and_nothing_is_trained_twice(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[float] = []
    seeds = [WORK, replace(WORK, seed=1)]
    first = trained(storage, *seeds, on_report=lambda _, r: reports.append(r["epoch"]))
    assert reports == [1, 2, 1, 2]
    assert len(set(first)) == 2
    monkeypatch.setattr(
        "pipelines.train.stage.train_network", lambda *_, **__: pytest.fail("trained")
    )
    assert trained(storage, *seeds) == first


def test_methods_that_differ_in_how_they_judge_share_a_training(storage: Storage) -> None:
    adjusted = replace(job("outlier_exposure", TRAINING, adjust_logits=1.0), backbone=NEW)
    told: list[NetworkJob] = []
    first, second = trained(storage, WORK, adjusted, on_report=lambda work, _: told.append(work))
    assert first == second
    assert told == [WORK, WORK]  # two epochs


def test_a_flipped_byte_of_the_weights_is_seen_and_the_network_trained_again(
    storage: Storage,
) -> None:
    (place,) = trained(storage, WORK)
    file = storage.local("cache", "networks", place, cache.WEIGHTS)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert trained(storage, WORK) == [place]
    assert file.read_bytes() == good


def test_a_training_that_is_stopped_goes_on_and_ends_with_the_same_bytes(
    storage: Storage, tmp_path: Path
) -> None:
    (place,) = trained(Storage.open(str(tmp_path / "whole")), WORK)
    whole = (tmp_path / "whole" / "cache" / "networks" / place / cache.WEIGHTS).read_bytes()

    def stop(_job: NetworkJob, _report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(storage, WORK, on_report=stop)
    assert cache.load_checkpoint(storage, place) is not None
    epochs: list[float] = []
    assert trained(storage, WORK, on_report=lambda _, r: epochs.append(r["epoch"])) == [place]
    assert epochs == [2]
    assert storage.read_bytes("cache", "networks", place, cache.WEIGHTS) == whole


def test_networks_that_start_from_each_other_train_in_one_go_as_one_after_the_other(
    storage: Storage, tmp_path: Path
) -> None:
    """The first of them is not there when the second is named."""
    (first,) = trained(storage, WORK)
    tuned = replace(from_weights(WORK), trained=first)
    (second,) = trained(storage, tuned)
    apart = Storage.open(str(tmp_path / "apart"))
    assert trained(apart, WORK, tuned) == [first, second]
    for place in (first, second):
        parts = "cache", "networks", place, cache.WEIGHTS
        assert apart.read_bytes(*parts) == storage.read_bytes(*parts)
    # It started from those weights: one step away from them, and far from other ones.
    states = [safetensors.torch.load(weights(storage, place)) for place in (first, second)]
    (other,) = trained(storage, replace(tuned, trained=None, backbone=seeded(tmp_path, 1)))
    states.append(safetensors.torch.load(weights(storage, other)))
    gaps = [
        sum(float((x[key] - y[key]).square().sum()) for key in x if "num_batches" not in key)
        for x, y in ((states[0], states[1]), (states[0], states[2]))
    ]
    assert 0 < gaps[0] < 0.1 * gaps[1]
    # Another start is another network; the backbone's own weights are none of it.
    at = [
        replace(tuned, trained=t, backbone=b)
        for t in (first, "other")
        for b in (NEW, seeded(tmp_path, 0))
    ]
    found = [cache.address(work, small_data()).address for work in at]
    assert found[0] == found[1] == second
    assert found[2] == found[3] != second


def weights(storage: Storage, place: str) -> bytes:
    return storage.read_bytes("cache", "networks", place, cache.WEIGHTS)


def seeded(folder: Path, number: int) -> BackboneConfig:
    """The architecture with drawn weights in a file."""
    torch.manual_seed(number)
    state = network.trainable(NEW, NAMES, "random", number).state()
    file = folder / f"{number}.safetensors"
    safetensors.torch.save_file(state, file)
    update = {"untrained": False, "path": str(file), "class_names": list(NAMES)}
    return NEW.model_copy(update=update)


def from_weights(work: NetworkJob) -> NetworkJob:
    """The same training, of weights in place of drawn ones."""
    assert work.method.network is not None
    head = work.method.head.model_copy(
        update={"train": work.method.network.model_copy(update={"start": "backbone"})}
    )
    return replace(work, method=work.method.model_copy(update={"head": head}))


def addresses() -> dict[str, str]:
    data = small_data()
    weight = job("outlier_exposure", TRAINING, weight=0.25)
    other_score = job("outlier_exposure", TRAINING, score="energy")
    adjusted = job("outlier_exposure", TRAINING, adjust_logits=1.0)
    part = job("outlier_exposure", TRAINING, parameters="norm_and_last")
    longer = job("outlier_exposure", TRAINING.model_copy(update={"epochs": 3}))
    return {
        name: cache.address(replace(work, backbone=backbone), given).address
        for name, work, given, backbone in (
            ("same", WORK, data, NEW),
            ("another score", other_score, data, NEW),
            ("a corrected class", adjusted, data, NEW),
            ("fewer parameters", part, data, NEW),
            ("another name", WORK, data, NEW.model_copy(update={"name": "x"})),
            ("another seed", replace(WORK, seed=1), data, NEW),
            ("another weight", weight, data, NEW),
            ("more epochs", longer, data, NEW),
            ("other images", WORK, replace(data, address="others"), NEW),
            ("another architecture", WORK, data, NEW.model_copy(update={"model": "resnet32"})),
        )
    }


def test_an_address_holds_what_decides_the_weights_and_nothing_else() -> None:
    found = addresses()
    same = found.pop("same")
    unchanged = {name for name, address in found.items() if address == same}
    assert unchanged == {"another score", "a corrected class", "another name"}
    changed = [address for address in found.values() if address != same]
    assert len(set(changed)) == len(changed)


def test_the_weights_of_a_backbone_do_not_decide_a_training_from_scratch(tmp_path: Path) -> None:
    configs = [seeded(tmp_path, number) for number in (0, 1)]

    def number_of_addresses(work: NetworkJob) -> int:
        every = [replace(work, backbone=config) for config in configs]
        return len({cache.address(one, small_data()).address for one in every})

    assert number_of_addresses(WORK) == 1
    assert number_of_addresses(from_weights(WORK)) == 2
