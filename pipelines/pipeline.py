"""All stages in order: embed, sweep, finetune, score, evaluate, register.

A stage reads the records of earlier ones and writes its own. It is found where its stamp is still
true (`pipelines.run`), so a killed run goes on where it was, and a stage whose code changed is
repeated. The functions here hand each stage what it works on; `STAGES` is their order.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pyarrow as pa

from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.cluster import connect
from pipelines.compute.stamp import stamp
from pipelines.config import UserError, to_yaml
from pipelines.data import kept
from pipelines.data.kept import Damaged
from pipelines.data.storage import Storage
from pipelines.embed import stage as embed
from pipelines.embed.result import EmbedResult
from pipelines.evaluate import against_default
from pipelines.evaluate import stage as evaluate
from pipelines.evaluate.against_default import DefaultSetting
from pipelines.evaluate.metrics import Facts, Metrics, Rejected
from pipelines.finetune import outlier_prior
from pipelines.finetune import stage as finetune
from pipelines.finetune.cache import load_predictor
from pipelines.finetune.data import TrainingData, TrainingJob
from pipelines.finetune.logged import train_logged
from pipelines.fitted import stage as fit_stage
from pipelines.fitted.fit import HeadToFit
from pipelines.fitted.result import FinetuneResult
from pipelines.fitted.stage import FittedOfHead
from pipelines.heads import HEADS
from pipelines.methods import METHODS, MethodConfig
from pipelines.records import HeadKey, HeadRef, Params, StoredRecord
from pipelines.register import choose
from pipelines.register import stage as register
from pipelines.register.detector import Detector
from pipelines.register.result import RegisterResult
from pipelines.run import Observer, Run
from pipelines.score import by_name as scoring
from pipelines.score import stage as score
from pipelines.score.cache import load_records
from pipelines.score.code import score_rows_used
from pipelines.score.result import HeadScores, ScoreResult
from pipelines.settings import PipelineConfig, words_again
from pipelines.store.locks import locked
from pipelines.store.registry import working
from pipelines.sweep import record as sweep_record
from pipelines.sweep import stage as sweep
from pipelines.sweep.result import SweepResult
from pipelines.sweep.surfaces import read_surfaces

# So often a run removes what is damaged and goes again through its stages.
MOST_MENDED = 20


def run(
    config: PipelineConfig,
    observer: Observer,
    *,
    only: str | None = None,
    last: str | None = None,
) -> Run:
    """Run the stages that are not done yet.

    Args:
        config: the resolved configuration.
        observer: is told what happens.
        only: one stage's name: run that one from what the previous ones wrote.
        last: the stage to end with; by default all of them.

    Raises:
        UserError: a set or an earlier stage is missing, what the stages raise, and whatever the
            file system or the MLflow store refuses.
    """
    with working(Storage.open(config.storage), config.tracking_uri):
        current = Run.open(config, observer)
        waiting = f"another process works on run {current.id}: waiting until it is done"
        with locked(current.storage, f"run-{current.id}", waiting):
            return _run(current, only, last)


def _run(current: Run, only: str | None, last: str | None) -> Run:
    """Run the stages; the arguments of `run`."""
    config, observer = current.config, current.observer
    for needed in ("train", "validation") if only is None else ():
        if needed not in current.benchmark.sets:
            raise UserError(
                f"benchmark {current.benchmark.name!r} has no set {needed!r}: heads are trained on "
                "train, thresholds are set on validation"
            )
    names = list(STAGES) if only is None else [only]
    if last is not None:
        names = names[: names.index(last) + 1]
    with ExitStack() as stack:
        with_ray = functools.cache(lambda: stack.enter_context(connect(config.compute)))
        for _ in range(MOST_MENDED):
            try:
                return _run_stages(current, names, with_ray)
            except Damaged as damaged:
                current = current.mended(damaged)
        return _run_stages(current, names, with_ray)


def _run_stages(current: Run, names: Sequence[str], with_ray: Callable[[], object]) -> Run:
    """Run those of the stages that are not done."""
    for name in before(names[0]):  # asked before Ray starts
        _refuse_stale(current, name)
    for number, name in enumerate(names, start=1):
        stage, code = STAGES[name], functools.partial(stage_code, name, current.config)
        reason = current.reason_to_run(name, code, before(name))
        if reason is None and name == "register":
            reason = current.reason_to_register
        if reason is None:
            current.observer.finished(name, 0.0, found=True)
            continue
        current.observer.started(name, number, len(names), reason)
        if stage.needs_ray:
            with_ray()
        start = time.perf_counter()
        current.finish(name, stage.run(current).to_json(), code(), before(name))
        current.observer.finished(name, time.perf_counter() - start, found=False)
    return current


def before(stage: str) -> list[str]:
    """The stages before one, in order."""
    return list(itertools.takewhile(lambda name: name != stage, STAGES))


def _refuse_stale(current: Run, name: str) -> None:
    """An earlier stage has to be done, and still true, when a later one runs alone."""
    code = functools.partial(stage_code, name, current.config)
    if not current.has(name):
        raise UserError(
            f"run {current.id} has no {name} yet: run python -m jobs.{name} (or jobs.pipeline) "
            "with the same words first"
        )
    if reason := current.reason_to_run(name, code, before(name)):
        raise UserError(
            f"run {current.id}: {name} has to be repeated first ({reason}): run python -m "
            f"jobs.{name} (or jobs.pipeline) with the same words"
        )


def stage_code(name: str, config: PipelineConfig) -> Code:
    """The code that can decide what a stage gives under a configuration.

    The plug-ins that the configuration names are part of it; the function here that hands the
    stage what it works on counts with its own text.
    """
    stage = STAGES[name]
    plugins: list[Entry] = []
    if stage.uses_plugins:
        for method in config.methods.values():
            modules = METHODS[method.name], HEADS[method.head.name]
            plugins += [module.Config.__module__ for module in modules]
        plugins += score_rows_used(config.scores)
    return code_of(*stage.entries, *plugins, alone=[stage.run])


def _embed(run: Run) -> EmbedResult:
    if "train" in run.benchmark.sets:
        # Which images train, after shots and imbalance.
        chosen = run.benchmark.sets["train"]
        names = ("source", "key", "label")
        columns = [pa.array(c) for c in (chosen.sources, chosen.keys, chosen.labels)]
        table = pa.table(columns, names=names)
        kept.write_table(run.storage, table, "runs", run.id, "train.parquet")
    return embed.embed_benchmark(
        run.benchmark,
        run.backbone,
        run.storage,
        settings=run.config.embed,
        compute=run.config.compute,
        shared_images=("runs", run.id, "shared_images.json"),
        on_progress=lambda done, total, rejected: run.observer.progress(
            done, total, f"images, {rejected} rejected" if rejected else "images"
        ),
    )


def _sweep(run: Run) -> SweepResult:
    stage = run.fit_stage if run.config.sweep.enabled else None
    if stage is not None:
        stage.prepare(name for name, space in run.config.sweep.space.items() if space)
    inputs = sweep.Inputs(
        methods=run.config.methods,
        scores=run.config.scores,
        sets=run.sets,
        backbone=run.backbone,
        storage=run.storage,
        fit_data=stage.data if stage is not None else None,
        records=load_records(run.storage, run.mined),
    )
    result, surfaces = sweep.run(
        inputs,
        run.config.sweep,
        compute=run.config.compute,
        on_progress=run.observer.progress,
    )
    place = sweep_record.Place(run.storage, run.id, run.tracker, run.tracking_run)
    sweep_record.keep(place, result, surfaces, words_again(run.config))
    return result


def _default_settings(run: Run) -> dict[str, DefaultSetting]:
    """The settings that the chosen ones are compared with; none where nothing was searched."""
    if not (run.config.sweep.enabled and run.config.compare_defaults):
        return {}
    return against_default.default_settings(
        run.config.methods,
        run.swept.methods,
        run.config.scores,
        num_train=len(run.benchmark.sets["train"]),
    )


def _finetune(run: Run) -> FinetuneResult:
    """The heads of the chosen and of the default settings, and what their scores need fitted."""
    choices, defaults = run.swept.methods, _default_settings(run)
    jobs = {
        HeadKey(method=name, seed=seed): TrainingJob(choices[name].setting, seed)
        for name in run.config.methods
        for seed in range(run.config.seeds)
    }
    every = {**jobs, **against_default.trainings(defaults, num_seeds=run.config.seeds)}
    data = _training_data(run, [job.method for job in every.values()])
    addresses = train_logged(
        every,
        lambda jobs, on_epoch: finetune.train(
            jobs,
            data,
            run.backbone,
            run.storage,
            compute=run.config.compute,
            mode=run.config.training,
            on_epoch=on_epoch,
        ),
        run.storage,
        tracker=run.tracker,
        parent=run.tracking_run,
        on_progress=run.observer.progress,
    )
    heads = {key: addresses[key] for key in jobs}
    heads |= against_default.default_heads(defaults, addresses)
    fitted = _fitted(run, heads, defaults)
    models = fit_stage.histories([fitted[key] for key in jobs], run.storage)
    fit_stage.log(models, run.tracker, run.tracking_run)
    counts = data.outlier_counts
    return FinetuneResult(
        heads=tuple(
            HeadRef(
                key=key,
                address=address,
                fitted={**{name: a for name, (_, a) in fitted[key].items()}, **run.mined},
            )
            for key, address in heads.items()
        ),
        outlier_counts=None if counts is None else tuple(counts.tolist()),
        energy_models=models,
    )


def _training_data(run: Run, methods: Sequence[MethodConfig]) -> TrainingData:
    """Features and labels; with the outliers counted by class where a method asks for it."""
    view = run.sets.for_training()
    data = sweep.training_data(view, methods)
    if not any(method.needs_outlier_counts for method in methods):
        return data
    return replace(data, outlier_counts=outlier_prior.measure(view, run.backbone, run.storage))


def _fitted(
    run: Run, heads: Mapping[HeadKey, str], defaults: Mapping[str, DefaultSetting]
) -> dict[HeadKey, FittedOfHead]:
    """What the scores of every head need fitted, by name."""
    stage, choices = run.fit_stage, run.swept.methods
    if stage is None:
        return {key: {} for key in heads}
    asked = []
    scores: Mapping[str, Params]
    for key, address in heads.items():
        if key.variant == "chosen":
            method, scores = choices[key.method].setting, choices[key.method].scores
        else:
            method, scores = defaults[key.method].method, defaults[key.method].scores
        asked.append(HeadToFit(method, key.seed, address, scores))
    return dict(zip(heads, stage.fit_heads(asked), strict=True))


def _score(run: Run) -> ScoreResult:
    choices, defaults = run.swept.methods, _default_settings(run)
    heads = []
    for head in run.finetuned.heads:
        of = choices if head.key.variant == "chosen" else defaults
        kind = run.config.methods[head.key.method].head.name
        scores = against_default.applicable(kind, of[head.key.method].scores, head.fitted)
        heads.append(HeadScores(**dict(head), scores=scores))
    return score.run(
        heads,
        run.sets,
        run.storage,
        at_once=run.config.compute.at_once,
        on_progress=lambda done, total: run.observer.progress(done, total, "shards"),
    )


def _evaluate(run: Run) -> Metrics:
    from pipelines.report import page as report  # draws: a found run needs none of it

    result, tables = run.swept, score.read_all(run.storage, run.scored)
    choices = {}
    for name, choice in result.methods.items():
        head = run.config.methods[name].head.name
        known = against_default.applicable(head, choice.scores, run.finetuned.head(name).fitted)
        # JSON keeps keys sorted, the user did not.
        ordered = {score: known[score] for score in run.config.scores if score in known}
        choices[name] = choice.model_copy(update={"scores": ordered})
    metrics = evaluate.run(
        tables,
        evaluate.Evaluation(
            facts=_facts(run),
            criterion=result.criterion,
            choices=choices,
            target_tpr=run.config.target_tpr,
            settings=run.config.evaluate,
            compare=run.config.compare,
            defaults=_default_settings(run),
            energy_models=run.finetuned.energy_models,
        ),
        on_progress=lambda done, total: run.observer.progress(done, total, "rows"),
    )
    run.observer.progress(1, 3, "parts, report")
    page = report.write(
        metrics,
        report.ReportInputs(
            scores=tables,
            config_yaml=to_yaml(run.config),
            stamp=stamp(run=run.id),
            sweep=result,
            surfaces=read_surfaces(run.storage, run.id),
            image=run.benchmark.image,
        ),
    )
    run.storage.write_bytes(page.encode(), "runs", run.id, "report.html")
    run.observer.progress(2, 3, "parts, MLflow")
    with run.tracker.run("", run_id=run.tracking_run) as active:
        active.log_metrics(report.tracked_figures(metrics))
        active.log_text(page, "report.html")
        active.log_text(metrics.to_json().decode(), "metrics.json")
        active.log_text(result.to_json().decode(), "sweep.json")
        active.log_text(to_yaml(run.config), "config.yaml")
    return metrics


def _facts(run: Run) -> Facts:
    return Facts(
        benchmark=run.benchmark.name,
        backbone=run.config.backbone.name,
        class_names=run.benchmark.class_names,
        notes=run.benchmark.notes,
        sets={name: len(chosen) for name, chosen in run.benchmark.sets.items()},
        rejected=tuple(
            Rejected(source=name, **dict(entry))
            for name, source in run.embedded.sources.items()
            for entry in source.rejected
        ),
        shared=tuple(entry.first for entry in run.embedded.shared),
    )


def _register(run: Run) -> RegisterResult:
    method, name = choose.champion(
        run.config.methods,
        run.config.scores,
        run.swept.methods,
        run.config.register_as,
        accuracy_tolerance=run.config.sweep.accuracy_tolerance,
    )
    row, head = run.metrics.row(method, name), run.finetuned.head(method)
    needed = {record: head.fitted[record] for record in scoring.records_read(name)}
    candidate = register.Candidate(
        predictor=load_predictor(run.storage, head.address),
        backbone=run.backbone,
        method=method,
        score=name,
        params=row.params,
        threshold=row.threshold,
        target_tpr=run.config.target_tpr,
        class_names=run.benchmark.class_names,
        decoding=run.config.embed.decoding(),
        batch_size=run.config.embed.batch_size,
        facts={"run": run.id, "benchmark": run.benchmark.name},
        records=load_records(run.storage, needed),
    )
    return register.register(
        candidate, run.tracker, run.tracking_run, settings=run.config.register_as
    )


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        run: gives the record of the stage; it hands `entries` what they work on.
        entries: where the computation starts.
        uses_plugins: whether heads, methods and scores decide what it gives.
        needs_ray: whether Ray has to run.
    """

    run: Callable[[Run], StoredRecord]
    entries: tuple[Entry, ...]
    uses_plugins: bool = True
    needs_ray: bool = True


STAGES: dict[str, Stage] = {
    "embed": Stage(_embed, (embed.embed_benchmark,), uses_plugins=False),
    "sweep": Stage(_sweep, (sweep.run, sweep_record.keep)),
    "finetune": Stage(
        _finetune,
        (finetune.train, fit_stage.FitStage, outlier_prior.measure, against_default.trainings),
    ),
    "score": Stage(_score, (score.run,)),
    "evaluate": Stage(
        _evaluate,
        (evaluate.run, score.read_all, "pipelines.report.page.write"),
        uses_plugins=False,
        needs_ray=False,
    ),
    "register": Stage(
        _register,
        (register.register, choose.champion, Detector.judge_images, Detector.judge_features),
        needs_ray=False,
    ),
}
