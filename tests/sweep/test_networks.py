"""Settings of whole networks: what a trial is, what is chosen, found again and made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score

from pipelines.backbones.kinds import cifar
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.sweep import networks as sweep
from pipelines.sweep import worker
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.network_trial import NetworkShared
from pipelines.sweep.networks import NetworkInputs
from pipelines.sweep.result import SweepResult, Trial
from pipelines.sweep.spec import MakeSpec, Spec
from pipelines.train import cache
from pipelines.train.stage import train
from tests.sweep.network_toy import network, toy_inputs, with_table
from tests.sweep.toy import Tune, in_process

SPACE = {"m_in": [-3.0, -2.0], "m_out": [-2.5, -1.0]}  # -2, -2.5 is in the wrong order
POSTHOC = {"budget": 4}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "outputs"))


def run(inputs: NetworkInputs, **settings: Any) -> SweepResult:
    settings = {"space": {"tuned": SPACE}} | settings
    return sweep.run(inputs, SweepConfig(posthoc=POSTHOC, **settings), compute=ComputeConfig())


def specs_of(
    inputs: NetworkInputs, tune_by: Callable[[Tune], None], **settings: Any
) -> tuple[list[Spec], NetworkShared]:
    """The trials that a search would run, without running one."""
    seen: list[Any] = []

    class Stopped(Exception):
        pass

    def note(specs: Sequence[Spec], shared: Any) -> None:
        seen.extend([list(specs), shared])
        raise Stopped

    tune_by(note)
    with pytest.raises(Stopped):
        run(inputs, **settings)
    return seen[0], seen[1]


def trained(inputs: NetworkInputs, trial: Trial) -> cache.AddressedNetwork:
    job = inputs.jobs["tuned"]
    method = network(**{**job.method.model_dump(include={"m_in", "m_out"}), **trial.settings})
    return cache.address(replace(job, method=method), inputs.data)


def logits(storage: Storage, address: str, inputs: NetworkInputs, source: str) -> Any:
    """Of the plain architecture with the weights that the trial kept."""
    plain = cifar.NETWORKS["resnet20"](3)
    place = storage.local("cache", "networks", address, cache.WEIGHTS)
    plain.load_state_dict(safetensors.torch.load_file(place))
    pixels = torch.from_numpy(inputs.tables[source].pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return plain.eval()((pixels - 0.5) / 0.25).double().numpy()


def energy(values: Any, tau: float) -> Any:
    return tau * np.log(np.exp(values / tau).sum(axis=1))


def test_a_trial_is_the_network_of_seed_0_judged_by_its_own_logits(
    storage: Storage, tune_by: Callable[[Tune], None]
) -> None:
    tune_by(in_process)
    inputs = toy_inputs(storage)
    found = run(inputs)
    assert found.judged_on == "validation_ood"
    assert [t.settings for t in found.trials] == [
        {"m_in": -3.0, "m_out": -2.5}, {"m_in": -3.0, "m_out": -1.0}, {"m_in": -2.0, "m_out": -1.0},
    ]  # fmt: skip
    for trial in found.trials:
        assert trial.status == "done"
        address = trained(inputs, trial).address
        known = logits(storage, address, inputs, "validation")
        labels = np.arange(len(known)) % 3
        assert trial.accuracy == pytest.approx((known.argmax(axis=1) == labels).mean())
        assert set(trial.scores) == {"energy", "msp"}  # what is fitted is searched later
        figures = trial.scores["energy"]
        assert figures.tried == 4
        tau = figures.params["tau"]
        areas = []
        for source in ("validation_ood-a", "validation_ood-b"):
            other = logits(storage, address, inputs, source)
            both = np.concatenate([energy(known, tau), energy(other, tau)])
            areas.append(roc_auc_score([1] * len(known) + [0] * len(other), both))
        assert figures.auroc == pytest.approx(np.mean(areas), abs=1e-3)
    assert len(storage.names("cache", "networks")) == 3


def test_the_choice_goes_by_the_criterion_and_its_network_is_not_trained_again(
    storage: Storage, tune_by: Callable[[Tune], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_by(in_process)
    inputs = toy_inputs(storage)
    found = run(inputs, accuracy_tolerance=1.0)
    best = max(found.trials, key=lambda t: t.scores["energy"].auroc)
    chosen = found.methods["tuned"]
    assert (chosen.trial, chosen.chosen) == (best.trial, best.settings)
    assert chosen.setting.network is not None
    monkeypatch.setattr(
        "pipelines.train.stage.train_network", lambda *_, **__: pytest.fail("trained again")
    )
    job = replace(inputs.jobs["tuned"], method=chosen.setting)
    (place,) = train([job], inputs.data, storage, compute=ComputeConfig(), mode="in_process")
    assert place == trained(inputs, best).address
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        train([replace(job, seed=1)], inputs.data, storage, compute=ComputeConfig(),
              mode="in_process")  # fmt: skip


def test_what_is_there_is_found(storage: Storage, tune_by: Callable[[Tune], None]) -> None:
    tune_by(in_process)
    first = run(toy_inputs(storage))

    def refuse(specs: Sequence[Spec], shared: Any) -> None:
        pytest.fail(f"run again: {specs}")

    tune_by(refuse)
    assert run(toy_inputs(storage)) == first


def test_a_failing_setting_is_on_record_and_all_failing_is_an_error(
    storage: Storage, tune_by: Callable[[Tune], None]
) -> None:
    tune_by(in_process)
    space = {"training.lr": [0.01, 1e30], "weight": [0.1, -1.0]}
    found = run(toy_inputs(storage), space={"tuned": space})
    by_setting = {tuple(t.settings.values()): t for t in found.trials}
    assert [t.status for t in found.trials].count("done") == 1
    assert "try a smaller training.lr" in str(by_setting[1e30, 0.1].reason)
    assert "greater than or equal to 0" in str(by_setting[0.01, -1.0].reason)
    with pytest.raises(UserError, match=r"every trial of tuned failed \(1\).*smaller training.lr"):
        run(toy_inputs(storage), space={"tuned": {"training.lr": [1e30]}})


@pytest.mark.parametrize(("learns", "judged_on"), [(True, "held_out_classes"), (False, "outliers")])
def test_outliers_stand_for_the_unknown_only_where_nothing_learns_from_them(
    storage: Storage, tune_by: Callable[[Tune], None], learns: bool, judged_on: str
) -> None:
    tune_by(in_process)
    inputs = toy_inputs(storage, left_out="validation_ood", learns=learns)
    found = run(inputs, space={"tuned": {"weight": [0.1]}})
    assert found.judged_on == judged_on
    assert [t.status for t in found.trials] == ["done"]


def test_without_validation_images_nothing_can_be_chosen(storage: Storage) -> None:
    with pytest.raises(UserError, match="no set validation to choose settings on"):
        run(toy_inputs(storage, left_out="validation"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("no_such", "no key 'no_such'"),
        ("head.train.start", "is not searched; two methods"),
        ("head.train", "is not searched; two methods"),
    ],
)
def test_what_a_network_cannot_be_searched_over_is_said(
    storage: Storage, key: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(toy_inputs(storage), space={"tuned": {key: ["random"]}})


def test_methods_of_other_budgets_are_refused(storage: Storage) -> None:
    # Equal as grids; of the one a pair is in the wrong order.
    space = {"tuned": SPACE, "other": {"weight": [0.1, 0.2, 0.3, 0.4]}}
    with pytest.raises(UserError, match="came tuned: 3, other: 4"):
        run(toy_inputs(storage, "tuned", "other"), space=space)


class TestAddress:
    @pytest.fixture
    def addresses(self, tune_by: Callable[[Tune], None]) -> Any:
        def of(inputs: NetworkInputs, **settings: Any) -> str:
            settings = {"space": {"tuned": {"weight": [0.5]}}} | settings
            (spec,), _ = specs_of(inputs, tune_by, **settings)
            return spec.address

        return of

    def test_it_holds_what_decides_the_record_and_nothing_else(
        self, storage: Storage, addresses: Any
    ) -> None:
        inputs = toy_inputs(storage)
        job = inputs.jobs["tuned"]
        same = addresses(inputs)
        unchanged = {
            "another criterion": addresses(toy_inputs(storage, score="msp")),
            "other parameters of scores": addresses(
                toy_inputs(storage, score_params={"energy": {"tau": 2.0}})
            ),
            "a default that the trial replaces": addresses(toy_inputs(storage, weight=0.7)),
            "other test images": addresses(with_table(inputs, "test", "others")),
            "other OOD test images": addresses(with_table(inputs, "ood-far-y", "others")),
            "a fitted score": addresses(toy_inputs(storage, scores=("energy", "msp"))),
            "random search": addresses(inputs, sampler="random", num_samples=1),
            "another tolerance": addresses(inputs, accuracy_tolerance=0.5),
        }
        assert {name for name, address in unchanged.items() if address != same} == set()
        resnet = job.backbone.model_copy(update={"model": "resnet32"})
        changed = {
            "another value": addresses(inputs, space={"tuned": {"weight": [0.6]}}),
            "another value beside it": addresses(toy_inputs(storage, adjust_logits=1.0)),
            "other images": addresses(with_table(inputs, "train", "others")),
            "other outliers": addresses(with_table(inputs, "outliers", "others")),
            "other validation images": addresses(with_table(inputs, "validation", "others")),
            "another unknown": addresses(with_table(inputs, "validation_ood-b", "others")),
            "one unknown set less": addresses(
                toy_inputs(storage, left_out="validation_ood", learns=False)
            ),
            "other scores": addresses(toy_inputs(storage, scores=("energy",))),
            "another architecture": addresses(
                replace(inputs, jobs={"tuned": replace(job, backbone=resnet)})
            ),
            "counted outliers": addresses(
                replace(inputs, jobs={"tuned": replace(job, outlier_counts=(1, 2, 3))})
            ),
        }
        # Energy margins ask for no counts.
        assert changed.pop("counted outliers") == same
        assert len({same, *changed.values()}) == 1 + len(changed)

    def test_the_range_of_temperatures_is_part_of_it(
        self, storage: Storage, addresses: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        same = addresses(toy_inputs(storage))
        monkeypatch.setitem(POSTHOC, "tau", [1.0, 1000.0])
        assert addresses(toy_inputs(storage)) != same


def test_each_epoch_is_judged_for_the_scheduler(
    storage: Storage, tune_by: Callable[[Tune], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"tuned": {"training.epochs": [3]}}
    (spec,), shared = specs_of(toy_inputs(storage), tune_by, space=space)
    make = MakeSpec("tuned", spec.config, shared.scores, "")
    monkeypatch.setattr(MakeSpec, "__call__", lambda *_: spec)
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    worker.live_trial({"values": spec.settings}, shared, make)
    assert [(r["epoch"], r["finished"]) for r in reports] == [
        (1, False), (2, False), (worker._AFTER_THE_LAST, True),
    ]  # fmt: skip
    # What was reported is what training itself says of the validation images after that epoch.
    place = cache.address(replace(shared.jobs["tuned"], method=spec.config), shared.data).address
    history = cache.entry(storage, place).read().history
    assert [r["accuracy"] for r in reports] == pytest.approx(
        [report["validation/accuracy"] for report in history]
    )
    assert all(0 <= r["auroc"] <= 1 for r in reports)
