"""What stands for the unknown, failures, shared trainings and fitted scores in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.feature_sets import FeatureSets
from pipelines.fitted import fit
from pipelines.methods import METHODS
from pipelines.score import cache as fitted_records
from pipelines.score import search as posthoc
from pipelines.score.config import PostHocConfig
from pipelines.sweep import stage as sweep
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import SweepResult
from pipelines.sweep.spec import Spec
from pipelines.sweep.trial import Shared
from pipelines.sweep.trial_record import TrialRecord
from tests.sweep.toy import (
    CLASSES,
    POSTHOC,
    Tune,
    in_process,
    method,
    run,
    run_with_surfaces,
    without,
)


class TestWhatStandsForTheUnknown:
    def test_outliers_where_no_method_learns_from_them(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        fewer = without(sets, "validation_ood")
        found = run({"zero_shot": method("zero_shot")}, fewer, backbone)
        assert found.judged_on == "outliers"
        assert "outliers" in found.criterion
        similarity = zero_shot_similarity(sets, backbone, "validation", "outliers")
        assert found.methods["zero_shot"].validation["mcm"].auroc == pytest.approx(
            best_mcm_auroc(similarity["validation"], similarity["outliers"], found), abs=1e-6
        )

    @pytest.mark.parametrize("name", ["validation_ood", "both"])
    def test_else_id_classes_held_out_in_turn(
        self,
        sets: FeatureSets,
        backbone: BackboneConfig,
        tune_by: Callable[[Tune], None],
        name: str,
    ) -> None:
        tune_by(in_process)
        # A method that learns from the outliers cannot be chosen by them.
        methods = {"zero_shot": method("zero_shot")}
        fewer = without(sets, "validation_ood")
        if name == "both":
            fewer = without(fewer, "outliers")
        else:
            methods["energy_margin"] = method("energy_margin", head={"name": "clip_adapter"})
        found = run(methods, fewer, backbone)
        assert found.judged_on == "held_out_classes"
        assert "ID data alone" in found.criterion
        whole = zero_shot_similarity(sets, backbone, "validation")["validation"]
        labels = sets.load("validation").labels
        aurocs = []
        for left_out in range(3):
            rest = [k for k in range(3) if k != left_out]
            known, unknown = whole[labels != left_out][:, rest], whole[labels == left_out][:, rest]
            aurocs.append(best_mcm_auroc(known, unknown, found))
        got = found.methods["zero_shot"].validation["mcm"].auroc
        assert got == pytest.approx(np.mean(aurocs), abs=1e-6)

    def test_two_classes_cannot_be_held_out(self) -> None:
        with pytest.raises(UserError, match="2 classes and neither validation_ood nor outliers"):
            posthoc.search_held_out_classes(
                "mcm", np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1]), 1.0,
                PostHocConfig(), num_classes=2,
            )  # fmt: skip


def zero_shot_similarity(
    sets: FeatureSets, backbone: BackboneConfig, *names: str
) -> dict[str, NDArray[np.float64]]:
    """Cosines with the prompts' features, without the code that a trial uses for it."""
    texts = [f"a photo of a {name}." for name in CLASSES]
    text = backbones.load(backbone).encode_text(texts).numpy()
    return {n: sets.load(n).features.astype(np.float64) @ text.T for n in names}


def best_mcm_auroc(
    known: NDArray[np.float64], unknown: NDArray[np.float64], found: SweepResult
) -> float:
    """scikit-learn's AUROC of MCM at the temperature that was chosen."""
    tau = found.methods["zero_shot"].scores["mcm"]["tau"]
    rows = np.concatenate([known, unknown]) / tau
    raised = np.exp(rows - rows.max(axis=1, keepdims=True))
    area: float = roc_auc_score(
        [1] * len(known) + [0] * len(unknown), (raised / raised.sum(axis=1, keepdims=True)).max(1)
    )
    return area


class TestFailures:
    SPACE: ClassVar = {"ebm": {"keep": [0.5, 2.0], "training.lr": [0.05, 1e30]}}

    def test_a_failing_setting_is_on_record_with_its_reason_and_stops_nothing(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        found = run({"ebm": method("ebm")}, sets, backbone, space=self.SPACE)
        by_setting = {tuple(t.settings.values()): t for t in found.trials}
        assert [t.status for t in found.trials].count("done") == 1
        assert "less than or equal to 1" in str(by_setting[2.0, 0.05].reason)
        assert "training.lr" in str(by_setting[0.5, 1e30].reason)
        assert by_setting[0.5, 1e30].accuracy is None
        assert found.methods["ebm"].chosen == {"keep": 0.5, "training.lr": 0.05}

    def test_a_failed_setting_is_not_tried_again(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        first = run({"ebm": method("ebm")}, sets, backbone, space=self.SPACE)

        def refuse(specs: Sequence[Spec], shared: Shared) -> None:
            pytest.fail(f"run again: {specs}")

        tune_by(refuse)
        assert run({"ebm": method("ebm")}, sets, backbone, space=self.SPACE) == first

    def test_all_failing_is_an_error_with_the_first_reason(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        with pytest.raises(UserError, match=r"every trial of ebm failed \(2\); the first .*keep"):
            run({"ebm": method("ebm")}, sets, backbone, space={"ebm": {"keep": [2.0, 3.0]}})

    def test_a_machine_that_fails_is_no_property_of_the_setting(self) -> None:
        def full() -> TrialRecord:
            raise OSError("no space left on device")

        with pytest.raises(OSError, match="no space left"):
            sweep_trial.attempt(full)


class TestSharing:
    def test_equal_trainings_are_one(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        trained: list[str] = []

        def counts(specs: Sequence[Spec], shared: Shared) -> None:
            trained.extend(spec.address for spec in specs)
            in_process(specs, shared)

        tune_by(counts)
        space = {"coop": {"score": ["mcm", "delta_energy"], "training.lr": [0.01, 0.02]}}
        found = run({"coop": method("coop")}, sets, backbone, space=space)
        assert len(found.trials) == 4
        assert len(trained) == 2
        aurocs = {(t.settings["score"], t.settings["training.lr"]): t.scores for t in found.trials}
        assert aurocs["mcm", 0.01] == aurocs["delta_energy", 0.01] != aurocs["mcm", 0.02]

    def test_the_surface_holds_every_setting_of_the_chosen_trial(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        tune_by(in_process)
        space = {"coop": {"training.lr": [0.01, 0.02]}}
        methods = {"coop": method("coop")}
        found, table = run_with_surfaces(methods, sets, backbone, space=space)
        assert table is not None
        rows = [r for r in table.to_pylist() if r["score"] == "delta_energy"]
        assert {(r["c"], r["tau"]) for r in rows} == {(c, t) for c in (1, 2) for t in (0.02, 5.0)}
        chosen = found.methods["coop"]
        best = max(rows, key=lambda r: (r["auroc"], -r["fpr"]))
        assert (best["tau"], best["c"]) == tuple(
            chosen.scores["delta_energy"][k] for k in ("tau", "c")
        )
        assert best["auroc"] == chosen.validation["delta_energy"].auroc
        assert {r["trial"] for r in rows} == {chosen.trial}


class TestFittedScores:
    """A trial fits what it judges by, and a sum takes its parts' chosen parameters."""

    TINY: ClassVar = {"width": 8, "hidden": 1, "epochs": 1, "steps": 2}

    def found(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> SweepResult:
        tune_by(in_process)
        storage = next(iter(sets.caches.values())).storage
        methods = {
            "zero_shot": METHODS["zero_shot"].Config(),
            "energy_correction": METHODS["energy_correction"].Config(**self.TINY),
        }
        inputs = sweep.Inputs(
            methods,
            ("energy", "energy+knn", "energy_correction", "vim"),
            sets,
            backbone,
            storage,
            fit_data=fit.load_data(sets, storage, mode="in_process"),
        )
        settings = SweepConfig(posthoc={**POSTHOC, "k": [1, 3, 99]})
        return sweep.run(inputs, settings, compute=ComputeConfig())[0]

    def test_parameters_and_figures(
        self, sets: FeatureSets, backbone: BackboneConfig, tune_by: Callable[[Tune], None]
    ) -> None:
        found = self.found(sets, backbone, tune_by).methods
        for choice in found.values():
            assert list(choice.validation) == [
                "energy",
                "energy+knn",
                "energy_correction",
                "vim",
            ]
            params = choice.scores["energy+knn"]
            assert params["energy.tau"] == choice.scores["energy"]["tau"]
            assert params["knn.k"] in (1, 3)
            assert choice.scores["energy_correction"] == {}
        # One energy model of seed 0 serves both methods: the settings are the same.
        storage = next(iter(sets.caches.values())).storage
        assert len(storage.names("cache", "fitted")) == 1
        (address,) = storage.names("cache", "fitted")
        record = fitted_records.load_record(storage, "energy_correction", address)
        validation, ood = (
            record(sets.load(name).features).numpy() for name in ("validation", "validation_ood/a")
        )
        other = record(sets.load("validation_ood/b").features).numpy()
        areas = [
            roc_auc_score([1] * len(validation) + [0] * len(o), np.concatenate([validation, o]))
            for o in (ood, other)
        ]
        auroc = found["zero_shot"].validation["energy_correction"].auroc
        assert auroc == pytest.approx(np.mean(areas), abs=1e-12)
