"""Choosing settings on validation data: what needs training by Ray Tune, the rest on arrays.

A trial trains one head with one training setting and then searches every score's parameters
exhaustively on the validation similarities, so temperatures and c cost no training. Only ID
validation and what stands for the unknown are seen: the view it works on refuses to open a test
set. The unknown is the sets `validation_ood`; without one the `outliers`, unless a method of the
run learns from them; without any OOD image, ID classes held out in turn.

Rule: among a method's trials whose ID validation accuracy is within `accuracy_tolerance` of its
best, the one whose own score has the highest mean AUROC over those sets; among equals the first.
For every score of that head, the parameters with the highest AUROC. Every trained method has the
same number of trials, every score the same number of settings. A method's losses never choose:
the DeltaEnergy bound is best, 0, where it does nothing (keep = 1).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from pipelines.backbones import clip as backbones
from pipelines.backbones.clip import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import Section, UserError, digest, group_names, plain
from pipelines.data.feature_sets import FeatureSet, FeatureSets
from pipelines.data.storage import Storage
from pipelines.finetune import columns as training_columns
from pipelines.finetune.cache import head_code
from pipelines.finetune.loop import TrainingData
from pipelines.fitted import search as fitted_search
from pipelines.fitted.plan import FitData
from pipelines.methods import METHODS, MethodConfig
from pipelines.methods.base import NOT_TRAINED
from pipelines.records import SetName
from pipelines.score import by_name as scoring
from pipelines.score import comparing_search
from pipelines.score import search as posthoc
from pipelines.score.search import PostHocConfig
from pipelines.sweep import space as search_space
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep import tune as sweep_tune
from pipelines.sweep.space import parse_method, with_values
from pipelines.sweep.trial import JudgedOn, Record, Shared
from pipelines.sweep.tune import Budget, Live, Progress, Search

__all__ = ["SweepConfig", "parse_method", "run", "training_data"]

CRITERIA: Mapping[JudgedOn, str] = {
    "validation_ood": "highest validation AUROC of the method's own score among trials whose ID "
    "validation accuracy is within the tolerance of the best",
    "outliers": "highest AUROC of the method's own score against the outliers (no validation_ood "
    "is given, and no method learns from them) among trials whose ID validation accuracy is "
    "within the tolerance of the best",
    "held_out_classes": "ID data alone: highest AUROC of the method's own score with ID classes "
    "held out in turn, among trials whose ID validation accuracy is within the tolerance of the "
    "best; fitted scores keep their defaults",
}
# One row for each post-hoc setting of a chosen trial; a parameter that a score lacks is null.
SURFACES = pa.schema(
    [
        ("method", pa.string()),
        ("trial", pa.int64()),
        ("score", pa.string()),
        *((name, pa.float64()) for name in ("tau", "c", "gamma", "k", "auroc", "fpr")),
    ]
)


class SweepConfig(Section):
    """What is searched; an empty `space` searches the scores' parameters only."""

    posthoc: PostHocConfig = PostHocConfig()
    space: dict[str, dict[str, Any]] = Field(
        {},
        description="by method: dotted keys, each with a list of values or {sampler: [...]}",
    )
    lr_factors: list[float] = Field(
        [],
        description="for a trained method that `space` does not name: its own learning rate times "
        "each of these; none: its own settings only",
    )
    sampler: search_space.Sampler = Field(
        "grid", description="grid: every combination of lists; random; optuna: TPE"
    )
    num_samples: int | None = Field(
        None, ge=1, description="trainings of each method; needed by random and optuna"
    )
    scheduler: Literal["none", "asha", "median"] = Field(
        "none", description="stops weak trials early, by their figures after each epoch"
    )
    grace_epochs: int = Field(5, ge=1, description="epochs before a trial may be stopped")
    objectives: list[Literal["auroc", "accuracy", "fpr"]] = Field(
        ["auroc"],
        min_length=1,
        description="what optuna looks at, several at once too; schedulers compare by the first",
    )
    time_budget_s: float | None = Field(
        None, gt=0, description="seconds after which no trial goes on"
    )
    seed: int = Field(0, ge=0, description="of random draws and of optuna")
    accuracy_tolerance: float = Field(
        0.01, ge=0, le=1, description="ID validation accuracy that a better AUROC may cost"
    )
    enabled: bool = Field(True, description="false: the defaults of every method and score")

    @model_validator(mode="after")
    def _spaces(self) -> SweepConfig:
        for method, space in self.space.items():
            for key, domain in space.items():
                if wrong := search_space.problem(domain):
                    raise ValueError(f"space.{method}.{key}: {wrong}")
                if self.sampler == "grid" and not isinstance(domain, list):
                    raise ValueError(
                        f"space.{method}.{key}: a grid needs a list of values; give one, or "
                        "sampler=random (or optuna) and num_samples"
                    )
        if self.sampler != "grid" and self.num_samples is None:
            raise ValueError(f"sampler={self.sampler}: give num_samples, the trainings a method")
        return self

    @model_validator(mode="after")
    def _equal_budgets(self) -> SweepConfig:
        if self.num_samples is not None:
            return self
        sizes = {m: search_space.size(s) for m, s in self.space.items() if s}
        if self.lr_factors:
            sizes["lr_factors"] = len(self.lr_factors)
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{method}: {n}" for method, n in sizes.items())
            raise ValueError(f"space: every method gets the same number of trials, came {listed}")
        return self

    def completed(self, methods: Mapping[str, MethodConfig]) -> SweepConfig:
        """With a space for each trained method of `methods`, where `lr_factors` gives one."""
        trained = {n: m for n, m in methods.items() if self.lr_factors and m.head.trainable}
        around = {
            name: {"training.lr": [factor * method.training.lr for factor in self.lr_factors]}
            for name, method in trained.items()
        }
        return self.model_copy(update={"space": {**around, **self.space}})


@dataclass(frozen=True)
class _MakeSpec:
    """The specification of a method's trial; runs in workers too."""

    name: str
    method: MethodConfig
    facts: Mapping[str, Any]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A setting's specification; one that the method refuses has its `problem` in it."""
        spec = {"method": self.name, "settings": dict(values)}
        for key in values:
            search_space.check_key(self.method, key)  # a typing error is no failed trial
        try:
            setting = with_values(self.method, values)
        except UserError as error:
            address = digest([self.name, plain(self.method), dict(values), str(error)])
            return {
                **spec, "config": plain(self.method), "address": address, "problem": str(error)
            }  # fmt: skip
        config = plain(setting)
        trained = {k: v for k, v in config.items() if k not in NOT_TRAINED}
        return {
            **spec,
            "config": config,
            "address": digest([trained, head_code(setting).digest, dict(self.facts)]),
        }


def training_data(sets: FeatureSets, methods: Iterable[MethodConfig] = ()) -> TrainingData:
    """The features that heads are trained on and judged by, and what `methods` ask for beside."""
    names = [name for name in ("train", "validation", "outliers") if name in sets.benchmark.sets]
    if "train" not in names:
        raise UserError(f"benchmark {sets.benchmark.name!r} has no set 'train'")
    loaded = {name: sets.load(name) for name in names}
    train = loaded["train"]
    empty = train.features[:0], train.labels[:0]
    validation = loaded.get("validation")
    data = TrainingData(
        class_names=sets.benchmark.class_names,
        templates=sets.benchmark.templates,
        features=train.features,
        labels=train.labels,
        validation_features=validation.features if validation else empty[0],
        validation_labels=validation.labels if validation else empty[1],
        outliers=loaded["outliers"].features if "outliers" in loaded else None,
        address=sets.address(names),
    )
    return training_columns.fill(data, sets, methods)


def run(
    methods: Mapping[str, MethodConfig],
    scores: Sequence[str],
    sets: FeatureSets,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: SweepConfig,
    compute: ComputeConfig,
    fit_data: FitData | None = None,
    records: scoring.Records = MappingProxyType({}),
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The chosen setting of every method and of every score under it.

    Args:
        methods: by the name they have in tables.
        scores: names, as `pipelines.score.by_name` has them.
        sets: the benchmark's features; only the training view of it is used.
        backbone: resolved.
        storage: finished trials are kept under `cache/trials/`.
        settings: the search space.
        compute: resources of a trial.
        fit_data: what scores are fitted to, where there is one that is.
        records: the mined words of neg_label, where it is among the scores.
        on_progress: called with (trials done, in all, a note).

    Returns:
        The content of `sweep.json`, and under `surfaces` the post-hoc settings of the chosen
        trials, one row each.

    Raises:
        UserError: for a benchmark without validation data, a space that does not fit, or a
            method all of whose trials failed.
    """
    if not settings.enabled:
        return _defaults(methods, scores, sets)
    settings = settings.completed(methods)
    known = sorted({*methods, *METHODS, *group_names("method")})
    for name in settings.space:
        if name not in known:
            raise UserError(f"sweep.space.{name}: no such method; allowed: {', '.join(known)}")
    view = sets.for_training()
    judged_on, ood = _unknown(methods, view)
    shared = Shared(
        training_data(view, methods.values()), view.load("validation"), ood, judged_on, backbone,
        storage, tuple(scores), settings.posthoc, fit_data, methods,
        comparing_search.local_features(view, ["validation", *ood], methods, scores), records,
    )  # fmt: skip
    trials = _trials(methods, settings, shared, sets, compute, on_progress)
    chosen = {
        name: _choose(name, [t for t in trials if t["method"] == name], settings)
        for name in methods
    }
    if judged_on == "held_out_classes":
        kept = {s: posthoc.defaults(s, num_train=len(shared.data.features)) for s in scores}
        for found in chosen.values():
            found["scores"] = {s: found["scores"].get(s, kept[s]) for s in scores}
    return {
        "criterion": CRITERIA[judged_on],
        "judged_on": judged_on,
        "sampler": settings.sampler,
        "scheduler": settings.scheduler,
        "accuracy_tolerance": settings.accuracy_tolerance,
        "budget": settings.posthoc.budget,
        "methods": chosen,
        "trials": [_brief(trial) for trial in trials],
        "surfaces": [
            row
            for name, found in chosen.items()
            for trial in trials
            if (trial["method"], trial["trial"]) == (name, found["trial"])
            for row in _surface(trial)
        ],
    }


def _defaults(
    methods: Mapping[str, MethodConfig], scores: Sequence[str], sets: FeatureSets
) -> dict[str, Any]:
    num_train = len(sets.benchmark.sets["train"])
    return {
        "criterion": "none: the defaults of every method and score",
        "accuracy_tolerance": 0.0,
        "budget": 0,
        "methods": {
            name: {
                "setting": plain(method),
                "chosen": {},
                "scores": posthoc.method_defaults(method, scores, num_train=num_train),
                "validation": {},
                "accuracy": None,
            }
            for name, method in methods.items()
        },
        "trials": [],
    }


def _unknown(
    methods: Mapping[str, MethodConfig], view: FeatureSets
) -> tuple[JudgedOn, dict[str, FeatureSet]]:
    """What stands for the unknown while settings are chosen."""
    if "validation" not in view.benchmark.sets:
        raise UserError(
            f"benchmark {view.benchmark.name!r} has no set validation to choose settings on; "
            "add one, or take the defaults with sweep=none"
        )
    if names := view.names("validation_ood"):
        return "validation_ood", {name: view.load(name) for name in names}
    learns = any(method.needs_outliers for method in methods.values())
    if "outliers" in view.benchmark.sets and not learns:
        return "outliers", {"outliers": view.load("outliers")}
    return "held_out_classes", {}


def _trials(
    methods: Mapping[str, MethodConfig],
    settings: SweepConfig,
    shared: Shared,
    sets: FeatureSets,
    compute: ComputeConfig,
    on_progress: Progress | None,
) -> list[Record]:
    """Every trial of every method: its record, and what was tried."""
    facts = _facts(shared, sets)
    makers = {name: _MakeSpec(name, method, facts) for name, method in methods.items()}
    # Settings that are neither proposed on the way nor stopped early.
    is_known = settings.scheduler == "none" and settings.sampler != "optuna"
    live_names = [name for name in methods if settings.space.get(name) and not is_known]
    specs = {
        name: [maker(values) for values in _settings(name, methods[name], settings)]
        for name, maker in makers.items()
        if name not in live_names
    }
    _check_budgets(specs, settings)
    searches = [_search(name, methods[name], settings) for name in live_names]
    total = sum(map(len, specs.values())) + sum(s.num_samples for s in searches)
    live, budget = Live(total, on_progress), Budget(settings.time_budget_s)
    found = _known(specs, shared, compute, budget, live)
    for search in searches:
        found[search.method] = sweep_tune.run_live(
            search, makers[search.method], shared, compute=compute, budget=budget, live=live
        )
    return [
        {**record, **spec, "trial": number}
        for name in methods
        for number, (spec, record) in enumerate(found[name])
    ]


def _facts(shared: Shared, sets: FeatureSets) -> dict[str, Any]:
    """What decides a trial's result besides its setting."""
    opened = [n for n in sets.benchmark.sets if SetName.parse(n).trains]
    return {
        "data": sets.address(opened),
        "judged_on": shared.judged_on,
        "backbone": dict(backbones.identity(shared.backbone)),
        "posthoc": plain(shared.posthoc),
        "scores": list(shared.scores),
        **fitted_search.identity(shared.scores, shared.methods),
        "records": {
            n: hashlib.sha256(scoring.to_bytes(r)).hexdigest() for n, r in shared.records.items()
        },
    }


def _known(
    specs: Mapping[str, Sequence[Mapping[str, Any]]],
    shared: Shared,
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
) -> dict[str, list[tuple[Mapping[str, Any], Record]]]:
    """Specifications with their records; those that share a training are one trial."""
    every = [spec for part in specs.values() for spec in part]
    has = functools.partial(sweep_trial.has_record, shared.storage)
    missing = list({s["address"]: s for s in every if not has(s["address"])}.values())
    live.done = len(every) - len(missing)
    live.show()
    reasons: dict[str, str] = {}
    if missing:
        reasons = sweep_tune.run_known(missing, shared, compute=compute, budget=budget, live=live)

    def record(spec: Mapping[str, Any]) -> Record:
        if spec["address"] in reasons:
            return sweep_trial.failed(UserError(reasons[spec["address"]]), 0.0)
        return sweep_trial.read_record(shared.storage, spec["address"])

    return {name: [(spec, record(spec)) for spec in part] for name, part in specs.items()}


def _settings(name: str, method: MethodConfig, settings: SweepConfig) -> list[dict[str, Any]]:
    return search_space.settings(
        method,
        settings.space.get(name, {}),
        sampler=settings.sampler,
        num_samples=settings.num_samples,
        seed=settings.seed,
    )


def _check_budgets(specs: Mapping[str, Sequence[Any]], settings: SweepConfig) -> None:
    """Equal budgets also after settings with margins in the wrong order were left out."""
    sizes = {name: len(found) for name, found in specs.items() if settings.space.get(name)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{method}: {n}" for method, n in sizes.items())
        raise UserError(
            f"sweep.space: every method gets the same number of trials, came {listed} (settings "
            "with m_in above m_out are left out); sweep.num_samples=N draws as many of each"
        )


def _search(name: str, method: MethodConfig, settings: SweepConfig) -> Search:
    space = settings.space[name]
    epochs = space.get("training.epochs", [method.training.epochs])
    listed = epochs if isinstance(epochs, list) else next(iter(epochs.values()))
    known = [] if settings.sampler == "optuna" else _settings(name, method, settings)
    for key in space:
        search_space.check_key(method, key)
    return Search(
        method=name,
        settings=known,
        space=space,
        num_samples=len(known) or settings.num_samples or 1,
        scheduler=settings.scheduler,
        objectives=tuple(settings.objectives),
        grace_epochs=settings.grace_epochs,
        max_epochs=max(listed),
        seed=settings.seed,
    )


def _choose(name: str, trials: Sequence[Record], settings: SweepConfig) -> dict[str, Any]:
    """The chosen trial of one method, by the rule at the head of this file."""
    done = [trial for trial in trials if trial["status"] == "done"]
    if not done:
        raise UserError(
            f"sweep: every trial of {name} failed ({len(trials)}); the first "
            f"({trials[0]['settings'] or 'its defaults'}): {trials[0]['reason']}"
        )
    best_accuracy = max(trial["accuracy"] for trial in done)
    fit = [t for t in done if t["accuracy"] >= best_accuracy - settings.accuracy_tolerance]
    chosen = max(fit, key=lambda t: sweep_tune.own_figures(t, t["config"]["score"])["auroc"])
    return {
        "setting": chosen["config"],
        "chosen": chosen["settings"],
        "trial": chosen["trial"],
        "scores": {score: figures["params"] for score, figures in chosen["scores"].items()},
        "validation": chosen["scores"],
        "accuracy": chosen["accuracy"],
    }


def _brief(trial: Record) -> dict[str, Any]:
    """A trial as `sweep.json` has it."""
    kept = ("method", "trial", "settings", "status", "reason", "accuracy", "seconds")
    figures = {
        name: {score: found[name] for score, found in trial["scores"].items()}
        for name in ("auroc", "fpr", "params")
    }
    return {**{name: trial[name] for name in kept}, **figures}


def _surface(trial: Record) -> list[dict[str, Any]]:
    """One row for each post-hoc setting of a trial."""
    rows = []
    for score, found in trial["surface"].items():
        for place, (auroc, fpr) in enumerate(zip(found["auroc"], found["fpr"], strict=True)):
            params = {name: float(values[place]) for name, values in found["params"].items()}
            row = {"method": trial["method"], "trial": trial["trial"], "score": score, **params}
            rows.append({**row, "auroc": auroc, "fpr": fpr})
    return rows
