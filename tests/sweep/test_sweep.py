"""The rule that chooses settings, equal budgets, and that no test image is opened for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.features import FeatureCache
from pipelines.data.storage import Storage
from pipelines.fitted import fit
from pipelines.methods import METHODS, MethodConfig
from pipelines.ood import SCORES
from pipelines.records import SetName
from pipelines.score import cache as fitted_records
from pipelines.score import search as posthoc
from pipelines.sweep import known, worker
from pipelines.sweep import space as search_space
from pipelines.sweep import stage as sweep
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.result import Choice, ScoreFigures, SweepResult
from pipelines.sweep.spec import Spec
from pipelines.sweep.trial import Shared
from pipelines.sweep.trial_record import TrialRecord, keep_record
from tests.feature_cache import make_cache

CLASSES = ("cat", "dog", "cow")
SIZES = {
    "train": 18,
    "validation": 24,
    "test": 12,
    "outliers": 6,
    "shifted/x": 12,
    "validation_ood/a": 15,
    "validation_ood/b": 9,
    "ood/near/y": 12,
}
TRAINING = {"epochs": 2, "batch_size": 9, "warmup_epochs": 0, "lr": 0.05}
POSTHOC = {"budget": 4, "c": [1, 2]}


@pytest.fixture(scope="module")
def backbone(backbone_files: dict[str, tuple[Path, Path]]) -> BackboneConfig:
    config, path = backbone_files["vit"]
    return BackboneConfig(name="tiny", config=str(config), path=str(path))


@pytest.fixture
def sets(tmp_path: Path) -> FeatureSets:
    """Random unit features, clustered by class; every set a shard of its own."""
    storage, random = Storage(str(tmp_path)), np.random.default_rng(0)
    centres = random.normal(size=(3, 16))
    chosen, caches = {}, {}
    for name, size in SIZES.items():
        source = name.replace("/", "-")
        known = SetName.parse(name).role in ("train", "validation", "test", "shifted")
        labels = [n % 3 if known else -1 for n in range(size)]
        rows = random.normal(size=(size, 16)) + (2 * centres[labels] if known else 0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        keys = [f"{source}/{n:02d}" for n in range(size)]
        caches[source] = make_cache(storage, source, dict(zip(keys, rows, strict=True)))
        chosen[name] = Selection((source,) * size, tuple(keys), tuple(labels))
    benchmark = Benchmark("toy", CLASSES, ("a photo of a {}.",), "", {}, chosen, "address")
    return FeatureSets(benchmark, caches)


def method(name: str, **changes: Any) -> MethodConfig:
    settings: dict[str, Any] = {"training": TRAINING}
    if name != "zero_shot":
        settings["head"] = {"name": "coop", "num_context": 2}
    config: MethodConfig = METHODS[name].Config(**settings | changes)
    return config


def without(sets: FeatureSets, missing: str) -> FeatureSets:
    """The same features without the sets of a role."""
    left = {n: s for n, s in sets.benchmark.sets.items() if SetName.parse(n).role != missing}
    benchmark = Benchmark("toy", CLASSES, ("a photo of a {}.",), "", {}, left, "address")
    return FeatureSets(benchmark, sets.caches)


Tune = Callable[[Sequence[Spec], Shared], None]


@pytest.fixture
def tune_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tune], None]:
    """Puts something else in Ray Tune's place."""

    def use(function: Tune) -> None:
        def run_known(specs: Sequence[Spec], shared: Shared, **_: Any) -> dict[str, str]:
            function(specs, shared)
            return {}

        monkeypatch.setattr(known, "run_known", run_known)

    return use


def in_process(specs: Sequence[Spec], shared: Shared) -> None:
    """What the Tune workers do, one trial after the other."""
    for spec in specs:
        worker.run(spec, shared)


def made_up(results: Mapping[str, Sequence[tuple[float, dict[str, float]]]]) -> Tune:
    """Results by method and trial: accuracy and the best AUROC of each score."""

    def write(specs: Sequence[Spec], shared: Shared) -> None:
        for number, spec in enumerate(specs):
            accuracy, aurocs = results[spec.method][number]
            params = {"tau": float(number)}
            scores = {
                name: ScoreFigures(params=params, auroc=auroc, fpr=0.5, tried=4)
                for name, auroc in aurocs.items()
            }
            record = TrialRecord(status="done", accuracy=accuracy, scores=scores, best_epoch=1)
            keep_record(record, shared.storage, spec.address)

    return write


def run(
    methods: Mapping[str, MethodConfig],
    sets: FeatureSets,
    backbone: BackboneConfig,
    scores: Sequence[str] = ("mcm", "delta_energy"),
    **settings: Any,
) -> SweepResult:
    return run_with_surfaces(methods, sets, backbone, scores, **settings)[0]


def run_with_surfaces(
    methods: Mapping[str, MethodConfig],
    sets: FeatureSets,
    backbone: BackboneConfig,
    scores: Sequence[str] = ("mcm", "delta_energy"),
    **settings: Any,
) -> tuple[SweepResult, pa.Table | None]:
    storage = next(iter(sets.caches.values())).storage
    config = SweepConfig(posthoc=POSTHOC, **settings)
    inputs = sweep.Inputs(methods, scores, sets, backbone, storage)
    return sweep.run(inputs, config, compute=ComputeConfig())


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
        for function in ("load", "present", "keys", "shards", "_read"):
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
                posthoc.PostHocConfig(),
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
        for method in found.values():
            assert list(method.validation) == [
                "energy",
                "energy+knn",
                "energy_correction",
                "vim",
            ]
            params = method.scores["energy+knn"]
            assert params["energy.tau"] == method.scores["energy"]["tau"]
            assert params["knn.k"] in (1, 3)
            assert method.scores["energy_correction"] == {}
        # One energy model of seed 0 serves both methods: the settings are the same.
        storage = next(iter(sets.caches.values())).storage
        assert len(storage.names("cache", "scores")) == 1
        (address,) = storage.names("cache", "scores")
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
