"""Choosing settings on validation data: what needs training by Ray Tune, the rest on arrays.

A trial trains one head with one training setting and then searches every score's parameters
exhaustively on the validation similarities, so temperatures and c cost no training. Only ID
validation and what stands for the unknown are seen: the view it works on refuses to open a test
set. The unknown is the sets `validation_ood`; without one the `outliers`, unless a method of the
run learns from them; without any OOD image, ID classes held out in turn.

The rule of choice stands in `pipelines.sweep.choice`. Every trained method has the same number of
trials, every score the same number of settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa

from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.finetune import columns as training_columns
from pipelines.finetune.loop import TrainingData
from pipelines.fitted.plan import FitData
from pipelines.methods import MethodConfig
from pipelines.score import by_name as scoring
from pipelines.score import comparing_search
from pipelines.score import search as posthoc
from pipelines.sweep import choice, surfaces
from pipelines.sweep import space as search_space
from pipelines.sweep.choice import FinishedTrial
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.progress import Budget, Live, Progress
from pipelines.sweep.result import Choice, JudgedOn, Settings, SweepResult
from pipelines.sweep.space import parse_method
from pipelines.sweep.spec import MakeSpec, Spec, inputs_digest
from pipelines.sweep.trial import Shared
from pipelines.sweep.trial_record import TrialRecord, failed, has_record, read_record

if TYPE_CHECKING:
    from pipelines.sweep.proposed import Search
    from pipelines.sweep.worker import Trials

__all__ = ["Inputs", "SweepConfig", "parse_method", "run", "training_data"]

Records: TypeAlias = list[tuple[Spec, TrialRecord]]


@dataclass(frozen=True)
class Inputs:
    """What a sweep chooses the settings of, and what it works on.

    Attributes:
        methods: by the name they have in tables.
        scores: names, as `pipelines.score.by_name` has them.
        sets: the benchmark's features; only the training view of it is used.
        backbone: resolved.
        storage: finished trials are kept under `cache/trials/`.
        fit_data: what scores are fitted to, where there is one that is.
        records: the mined words of neg_label, where it is among the scores.
        learns: whether a method of the run that is none of `methods` learns from outliers.
    """

    methods: Mapping[str, MethodConfig]
    scores: Sequence[str]
    sets: FeatureSets
    backbone: BackboneConfig
    storage: Storage
    fit_data: FitData | None = None
    records: scoring.Records = field(default_factory=dict)
    learns: bool = False


def run(
    inputs: Inputs,
    settings: SweepConfig,
    *,
    compute: ComputeConfig,
    on_progress: Progress | None = None,
) -> tuple[SweepResult, pa.Table | None]:
    """Choose the setting of every method and of every score under it.

    Args:
        inputs: the methods and scores, and the features that they are judged on.
        settings: the search space.
        compute: resources of a trial.
        on_progress: called with (trials done, in all, a note).

    Returns:
        The content of `sweep.json`, and the post-hoc settings of the chosen trials, one row each;
        None where no score's parameters were searched.

    Raises:
        UserError: for a benchmark without validation data, a space that does not fit, or a
            method all of whose trials failed.
    """
    methods = inputs.methods
    if not settings.enabled:
        num_train = len(inputs.sets.benchmark.sets["train"])
        return choice.defaults(methods, inputs.scores, num_train=num_train), None
    settings = settings.completed(methods)
    search_space.check_names(settings.space, methods)
    shared = _shared(inputs, settings)
    digest = inputs_digest(shared, inputs.sets)
    makers = {n: MakeSpec(n, method, shared.scores, digest) for n, method in methods.items()}
    finished = run_trials(makers, shared, settings, compute=compute, on_progress=on_progress)
    chosen = {name: choice.choose(finished[name], settings.accuracy_tolerance) for name in methods}
    choices = {name: _choice(trial, shared) for name, trial in chosen.items()}
    result = choice.result_of(finished, choices, settings, shared.judged_on)
    records = [(name, trial.number, trial.record) for name, trial in chosen.items()]
    return result, surfaces.table(records, inputs.scores)


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
        views=sets.views_of("train"),
    )
    return training_columns.fill(data, sets, methods)


def _shared(inputs: Inputs, settings: SweepConfig) -> Shared:
    """What every trial works on, opened through the view that holds no test set."""
    view, methods, scores = inputs.sets.for_training(), inputs.methods, inputs.scores
    learns = inputs.learns or any(method.needs_outliers for method in methods.values())
    judged_on, names = unknown(view.benchmark, learns=learns)
    ood = {name: view.load(name) for name in names}
    return Shared(
        data=training_data(view, methods.values()),
        validation=view.load("validation"),
        ood=ood,
        judged_on=judged_on,
        backbone=inputs.backbone,
        storage=inputs.storage,
        scores=tuple(scores),
        posthoc=settings.posthoc,
        fit_data=inputs.fit_data,
        methods=methods,
        local=comparing_search.local_features(view, ["validation", *ood], methods, scores),
        records=inputs.records,
    )


def unknown(benchmark: Benchmark, *, learns: bool) -> tuple[JudgedOn, list[str]]:
    """What stands for the unknown while settings are chosen, and the names of its sets.

    Args:
        benchmark: its sets.
        learns: whether a method of the run learns from outliers.

    Raises:
        UserError: for a benchmark without validation images.
    """
    if "validation" not in benchmark.sets:
        raise UserError(
            f"benchmark {benchmark.name!r} has no set validation to choose settings on; "
            "add one, or take the defaults with sweep=none"
        )
    if names := benchmark.names("validation_ood"):
        return "validation_ood", names
    if "outliers" in benchmark.sets and not learns:
        return "outliers", ["outliers"]
    return "held_out_classes", []


def _choice(chosen: FinishedTrial, shared: Shared) -> Choice:
    """A method's choice; scores that were not searched keep their defaults.

    Those are what no held-out class can judge, and what judges images after an input step: each
    setting of it would be a pass over the pixels.
    """
    chosen_setting = choice.choice_of(chosen)
    kept = shared.scores if shared.judged_on == "held_out_classes" else scoring.OWN_PASS
    num_train = len(shared.data.features)
    defaults = posthoc.method_defaults(
        chosen_setting.setting, [s for s in shared.scores if s in kept], num_train=num_train
    )
    return chosen_setting.model_copy(update={"scores": {**defaults, **chosen_setting.scores}})


def run_trials(
    makers: Mapping[str, MakeSpec],
    shared: Trials,
    settings: SweepConfig,
    *,
    compute: ComputeConfig,
    on_progress: Progress | None,
) -> dict[str, list[FinishedTrial]]:
    """Every trial of every method, by the method's name.

    Args:
        makers: by the method's name, what specifies its trials.
        shared: what they work on.
        settings: the search space.
        compute: resources of a trial.
        on_progress: called with (trials done, in all, a note).

    Raises:
        UserError: for a space that does not fit.
    """
    methods = {name: make.method for name, make in makers.items()}
    # Settings that are neither proposed on the way nor stopped early.
    is_known = settings.scheduler == "none" and settings.sampler != "optuna"
    names = [name for name in methods if settings.space.get(name) and not is_known]
    specs = {
        name: [make(values) for values in _settings(name, methods[name], settings)]
        for name, make in makers.items()
        if name not in names
    }
    _check_budgets(specs, settings)
    searches = [_search(name, methods[name], settings) for name in names]
    total = sum(map(len, specs.values())) + sum(s.num_samples for s in searches)
    live, budget = Live(total, on_progress), Budget(settings.time_budget_s)
    records = _run_known(specs, shared, compute=compute, budget=budget, live=live)
    if searches:
        from pipelines.sweep import proposed  # Ray Tune takes seconds to import
    for search in searches:
        records[search.method] = proposed.run_proposed(
            search, makers[search.method], shared, compute=compute, budget=budget, live=live
        )
    return {
        name: [FinishedTrial(spec, n, record) for n, (spec, record) in enumerate(records[name])]
        for name in methods
    }


def _run_known(
    specs: Mapping[str, Sequence[Spec]],
    shared: Trials,
    *,
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
) -> dict[str, Records]:
    """Specifications with their records; those that share a training are one trial."""
    every = [spec for part in specs.values() for spec in part]
    absent = {s.address: s for s in every if not has_record(shared.storage, s.address)}
    live.done = len(every) - len(absent)
    live.show()
    reasons: dict[str, str] = {}
    if absent:
        from pipelines.sweep import known  # Ray Tune takes seconds to import

        reasons = known.run_known(
            list(absent.values()), shared, compute=compute, budget=budget, live=live
        )

    def record(spec: Spec) -> TrialRecord:
        if spec.address in reasons:
            return failed(UserError(reasons[spec.address]))
        return read_record(shared.storage, spec.address)

    return {name: [(spec, record(spec)) for spec in part] for name, part in specs.items()}


def _settings(name: str, method: MethodConfig, settings: SweepConfig) -> list[Settings]:
    return search_space.settings(
        method,
        settings.space.get(name, {}),
        sampler=settings.sampler,
        num_samples=settings.num_samples,
        seed=settings.seed,
    )


def _check_budgets(specs: Mapping[str, Sequence[Spec]], settings: SweepConfig) -> None:
    """Equal budgets also after settings with margins in the wrong order were left out."""
    sizes = {name: len(part) for name, part in specs.items() if settings.space.get(name)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{method}: {n}" for method, n in sizes.items())
        raise UserError(
            f"sweep.space: every method gets the same number of trials, came {listed} (settings "
            "with m_in above m_out are left out); sweep.num_samples=N draws as many of each"
        )


def _search(name: str, method: MethodConfig, settings: SweepConfig) -> Search:
    from pipelines.sweep.proposed import Search

    space = settings.space[name]
    epochs = space.get("training.epochs", [method.training.epochs])
    listed = epochs if isinstance(epochs, list) else next(iter(epochs.values()))
    values = [] if settings.sampler == "optuna" else _settings(name, method, settings)
    for key in space:
        search_space.check_key(method, key, name)
    return Search(
        method=name,
        settings=values,
        space=space,
        num_samples=len(values) or settings.num_samples or 1,
        scheduler=settings.scheduler,
        objectives=tuple(settings.objectives),
        grace_epochs=settings.grace_epochs,
        max_epochs=max(listed) * method.num_stages,
        seed=settings.seed,
    )
