"""The rule that chooses settings, equal budgets, and that no test image is opened for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import FeatureCache
from pipelines.methods import METHODS
from pipelines.ood import SCORES
from pipelines.sweep import space as search_space
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import Choice
from pipelines.sweep.spec import Spec
from pipelines.sweep.trial import Shared
from tests.sweep.toy import (
    CLASSES,
    SIZES,
    TRAINING,
    Tune,
    in_process,
    made_up,
    method,
    run,
    without,
)


class TestChoice:
    SPACE: ClassVar = {"coop": {"training.lr": [0.1, 0.2, 0.3, 0.4]}}

    def chosen(
        self,
        results: Sequence[tuple[float, dict[str, float]]],
        sets: FeatureSets,
        backbone: BackboneConfig,
        tune_by: Callable[[Tune], None],
        **changes: Any,
    ) -> Choice:
        tune_by(made_up({"coop": results}))
        methods = {"coop": method("coop", **changes)}
        found = run(methods, sets, backbone, space=self.SPACE, accuracy_tolerance=0.01)
        return found.methods["coop"]

    def test_best_own_score_among_the_accurate_and_the_first_of_equals(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        results = [
            (0.900, {"mcm": 0.80, "delta_energy": 0.99}),
            (0.895, {"mcm": 0.85, "delta_energy": 0.70}),  # this one
            (0.850, {"mcm": 0.99, "delta_energy": 0.99}),  # not accurate enough
            (0.895, {"mcm": 0.85, "delta_energy": 0.90}),  # equal, but later
        ]
        found = self.chosen(results, sets, backbone, tune_by)
        assert found.chosen == {"training.lr": 0.2}
        assert found.setting.training.lr == 0.2
        assert found.accuracy == 0.895
        assert found.scores == {"mcm": {"tau": 1.0}, "delta_energy": {"tau": 1.0}}
        assert found.validation["delta_energy"].auroc == 0.70

    def test_the_methods_own_score_decides(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        results = [(0.9, {"mcm": 0.8 + n / 100, "delta_energy": 0.9 - n / 100}) for n in range(4)]
        assert self.chosen(results, sets, backbone, tune_by).chosen == {"training.lr": 0.4}

    def test_a_method_judged_by_none_of_its_scores_takes_their_mean(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        means = [0.70, 0.74, 0.78, 0.71]
        results = [(0.9, {"mcm": m - n / 100, "delta_energy": m + n / 100})
                   for n, m in enumerate(means)]  # fmt: skip
        found = self.chosen(results, sets, backbone, tune_by, score="energy")
        assert found.chosen == {"training.lr": 0.3}


class TestBudgets:
    def test_every_method_of_the_space_has_as_many_trials(self) -> None:
        space = {"coop": {"training.lr": [1, 2]}, "ebm": {"weight": [1, 2], "keep": [0.5, 1]}}
        with pytest.raises(ValidationError, match="same number of trials, came coop: 2, ebm: 4"):
            SweepConfig(space=space)
        SweepConfig(space={**space, "coop": {"training.lr": [1, 2, 3, 4]}})

    def test_every_combination_is_tried_and_every_score_as_often(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        space = {
            "coop": {"training.lr": [0.01, 0.02, 0.03, 0.04]},
            "ebm": {"weight": [0.5, 2.0], "keep": [0.25, 0.5]},
        }
        methods = {"coop": method("coop"), "ebm": method("ebm")}
        scores = ("mcm", "energy", "delta_energy")
        found = run(methods, sets, backbone, scores, space=space)
        tried = {(t.method, tuple(t.settings.values())) for t in found.trials}
        grid = [(w, k) for w in (0.5, 2.0) for k in (0.25, 0.5)]
        assert tried == {("coop", (lr,)) for lr in (0.01, 0.02, 0.03, 0.04)} | {
            ("ebm", pair) for pair in grid
        }
        parts = [m.validation.values() for m in found.methods.values()]
        assert {figures.tried for part in parts for figures in part} == {4}

    def test_a_trained_method_that_is_not_named_has_as_many_around_its_own_rate(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        methods = {"zero_shot": METHODS["zero_shot"].Config()}
        methods |= {"coop": method("coop"), "ebm": method("ebm")}
        space = {"ebm": {"weight": [0.5, 2.0]}}
        found = run(methods, sets, backbone, space=space, lr_factors=[0.5, 2.0])
        tried = [(t.method, t.settings) for t in found.trials]
        assert tried == [
            ("zero_shot", {}),
            ("coop", {"training.lr": 0.025}),  # half and twice the 0.05 of TRAINING
            ("coop", {"training.lr": 0.1}),
            ("ebm", {"weight": 0.5}),
            ("ebm", {"weight": 2.0}),
        ]

    def test_as_many_as_the_named_ones(self) -> None:
        space = {"coop": {"training.lr": [1, 2]}}
        with pytest.raises(ValidationError, match="came coop: 2, lr_factors: 3"):
            SweepConfig(space=space, lr_factors=[0.5, 1, 2])


class TestSpace:
    @pytest.mark.parametrize("key", ["training.momentun", "weigth", "head.a.b", "lr"])
    def test_a_key_that_does_not_exist(self, key: str) -> None:
        with pytest.raises(UserError) as caught:
            search_space.with_values(method("ebm"), {key: 1})
        assert str(caught.value) == f"sweep.space.ebm: no key {key!r} in method ebm"

    def test_a_value_that_the_method_refuses(self) -> None:
        with pytest.raises(UserError, match=r"sweep\.space\.ebm: .*'keep': 2.*less than or equal"):
            search_space.with_values(method("ebm"), {"keep": 2})

    def test_values_are_laid_over_the_method(self) -> None:
        found = search_space.with_values(method("ebm"), {"keep": 0.25, "training.lr": 0.5})
        assert (found.keep, found.training.lr) == (0.25, 0.5)  # type: ignore[attr-defined]
        assert found.training.epochs == 2

    def test_a_method_that_does_not_exist(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        with pytest.raises(UserError, match=r"sweep\.space\.cop: no such method; allowed: .*coop"):
            run({"coop": method("coop")}, sets, backbone, space={"cop": {"training.lr": [1]}})


class TestData:
    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """The sources whose features or keys are read; each set is a source of its own."""
        names: set[str] = set()
        for function in ("load", "present", "keys", "read_shard", "_table", "_read"):
            real = getattr(FeatureCache, function)

            def spy(self: FeatureCache, *args: Any, _real: Any = real, **named: Any) -> Any:
                names.add(self.address)
                return _real(self, *args, **named)

            monkeypatch.setattr(FeatureCache, function, spy)
        return names

    def test_no_test_set_is_opened(
        self,
        sets: FeatureSets,
        backbone: BackboneConfig,
        tune_by: Callable[[Tune], None],
        opened: set[str],
    ) -> None:
        tune_by(in_process)
        run({"zero_shot": method("zero_shot"), "ebm": method("ebm")}, sets, backbone)
        allowed = {"train", "validation", "outliers", "validation_ood-a", "validation_ood-b"}
        assert opened == allowed
        sets.load("test")
        assert opened == {*allowed, "test"}  # the spy does see it

    def test_the_figures_are_those_of_the_validation_images(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        found = run({"zero_shot": method("zero_shot")}, sets, backbone).methods["zero_shot"]
        model = backbones.load(backbone)
        texts = model.encode_text([f"a photo of a {name}." for name in CLASSES]).numpy()
        similarity = {n: sets.load(n).features.astype(np.float64) @ texts.T for n in SIZES}
        labels = sets.load("validation").labels
        assert found.accuracy == np.mean(similarity["validation"].argmax(axis=1) == labels)
        tau = found.scores["mcm"]["tau"]

        def mcm(name: str) -> list[float]:
            raised = np.exp(similarity[name] / tau)
            return list((raised / raised.sum(axis=1, keepdims=True)).max(axis=1))

        known = mcm("validation")
        aurocs = [
            roc_auc_score([1] * len(known) + [0] * SIZES[name], known + mcm(name))
            for name in ("validation_ood/a", "validation_ood/b")
        ]
        assert found.validation["mcm"].auroc == pytest.approx(np.mean(aurocs), abs=1e-3)

    def test_finished_trials_are_not_run_again(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        space = {"coop": {"training.lr": [0.01, 0.02]}}
        methods = {"coop": method("coop")}

        def dies_after_the_first(specs: Sequence[Spec], shared: Shared) -> None:
            in_process(specs[:1], shared)
            raise KeyboardInterrupt

        tune_by(dies_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            run(methods, sets, backbone, space=space)
        rest: list[float] = []

        def counts(specs: Sequence[Spec], shared: Shared) -> None:
            rest.extend(spec.settings["training.lr"] for spec in specs)
            in_process(specs, shared)

        tune_by(counts)
        first = run(methods, sets, backbone, space=space)
        assert rest == [0.02]
        assert run(methods, sets, backbone, space=space) == first
        assert rest == [0.02]
        longer = {"coop": method("coop", training={**TRAINING, "epochs": 3})}
        run(longer, sets, backbone, space=space)
        assert rest == [0.02, 0.01, 0.02]

    def test_without_validation_images(self, sets: FeatureSets, backbone: BackboneConfig) -> None:
        with pytest.raises(UserError, match=r"has no set validation .*sweep=none"):
            run({"zero_shot": method("zero_shot")}, without(sets, "validation"), backbone)

    def test_switched_off_it_opens_nothing_and_takes_the_defaults(
        self, sets: FeatureSets, backbone: BackboneConfig, opened: set[str]
    ) -> None:
        found = run({"ebm": method("ebm")}, sets, backbone, enabled=False).methods["ebm"]
        assert opened == set()
        assert found.setting.training.lr == 0.05
        assert found.scores["mcm"] == dict(SCORES["mcm"].parameters)
        assert found.validation == {}
