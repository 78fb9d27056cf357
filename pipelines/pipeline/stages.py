"""What each stage is handed: its settings, and the records of the stages before it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from pipelines.compute.stamp import stamp
from pipelines.config import to_yaml
from pipelines.data import kept
from pipelines.embed.benchmark import embed_benchmark, embed_pass
from pipelines.embed.result import EmbeddedSource, EmbedResult, NetworkFeatures
from pipelines.evaluate import against_default
from pipelines.evaluate import stage as evaluate
from pipelines.evaluate.against_default import DefaultSetting
from pipelines.evaluate.metrics import Facts, Metrics, Rejected
from pipelines.finetune import cache as head_cache
from pipelines.finetune import outlier_prior
from pipelines.finetune import stage as finetune
from pipelines.finetune.data import TrainingData, TrainingJob
from pipelines.finetune.logged import train_logged
from pipelines.fitted import stage as fit_stage
from pipelines.fitted.fit import HeadToFit
from pipelines.fitted.result import FinetuneResult, HeadTraining
from pipelines.fitted.stage import FittedOfHead
from pipelines.methods import MethodConfig
from pipelines.pipeline import network_sweep
from pipelines.pipeline.patches import maps_of
from pipelines.records import HeadKey, HeadRef, Params
from pipelines.run import Run
from pipelines.run.space import FeatureSpace
from pipelines.score import by_name as scoring
from pipelines.score import stage as score
from pipelines.score.cache import load_records
from pipelines.score.result import HeadScores, ScoredHead, ScoreResult
from pipelines.settings.config import words_again
from pipelines.sweep import record as sweep_record
from pipelines.sweep import stage as sweep
from pipelines.sweep.result import SweepResult
from pipelines.sweep.surfaces import read_surfaces
from pipelines.train.views import embed_views


def hand_embed(run: Run) -> EmbedResult:
    """The benchmark's features of every backbone, and the leak check of its images.

    Which images train is written beside.
    """
    if "train" in run.benchmark.sets:
        # Which images train, after shots and imbalance.
        chosen = run.benchmark.sets["train"]
        names = ("source", "key", "label")
        columns = [pa.array(c) for c in (chosen.sources, chosen.keys, chosen.labels)]
        table = pa.table(columns, names=names)
        kept.write_table(run.storage, table, "runs", run.id, "train.parquet")
    networks = run.trained.networks
    backbones = [run.backbone_of(network) for network in networks]
    results = embed_benchmark(
        run.benchmark,
        ([run.backbone] if run.frozen else []) + backbones,
        run.storage,
        settings=run.config.embed,
        compute=run.config.compute,
        shared_images=("runs", run.id, "shared_images.json"),
        on_progress=lambda done, total, rejected: run.observer.progress(
            done, total, f"images, {rejected} rejected" if rejected else "images"
        ),
    )
    own = results[len(results) - len(networks) :]
    return results[0].model_copy(
        update={
            "sources": _with_views(run, results[0].sources),
            "networks": tuple(
                NetworkFeatures(key=network.key, sources=result.sources)
                for network, result in zip(networks, own, strict=True)
            ),
        }
    )


def _with_views(run: Run, sources: Mapping[str, EmbeddedSource]) -> Mapping[str, EmbeddedSource]:
    """The sources with the addresses of their training images' views, where a head takes them."""
    if not run.frozen:
        return sources
    found = embed_views(
        run.benchmark,
        run.backbone,
        run.storage,
        settings=run.config.embed,
        compute=run.config.compute,
        on_progress=lambda done, total, _: run.observer.progress(done, total, "images, views"),
    )
    return {
        name: source.model_copy(update={"views": found.get(name)})
        for name, source in sources.items()
    }


def hand_sweep(run: Run) -> SweepResult:
    """What is chosen and on what; its surfaces, evidence and best settings are written beside.

    A method that trains networks is judged by that of the first seed; its own settings were
    chosen by the stage train, whose trials are listed here.
    """
    parts = [_swept(run, space) for space in run.spaces if 0 in space.seeds]
    result, tables = parts[0][0], [table for _, table in parts if table is not None]
    chosen = {name: choice for part, _ in parts for name, choice in part.methods.items()}
    methods = {name: chosen[name] for name in run.config.methods}
    trials = tuple(trial for part, _ in parts for trial in part.trials)
    result = result.model_copy(update={"methods": methods, "trials": trials})
    surfaces = pa.concat_tables(tables, promote_options="default") if tables else None
    result, surfaces = network_sweep.joined(run, result, surfaces)
    place = sweep_record.Place(run.storage, run.id, run.tracker, run.tracking_run)
    sweep_record.keep(place, result, surfaces, words_again(run.config))
    return result


def _swept(run: Run, space: FeatureSpace) -> tuple[SweepResult, pa.Table | None]:
    """What is chosen of one space's methods."""
    settings = run.config.sweep
    # Of networks, the stage train has searched what is theirs.
    others = set(run.config.methods) - (set(space.methods) & set(run.frozen))
    searched = {n: s for n, s in settings.space.items() if n not in others}
    stage = space.fit_stage if settings.enabled else None
    if stage is not None:
        stage.prepare(name for name, values in searched.items() if values)
    inputs = sweep.Inputs(
        methods=space.methods,
        scores=space.scores,
        sets=space.sets,
        backbone=space.backbone,
        storage=run.storage,
        fit_data=stage.data if stage is not None else None,
        records=load_records(run.storage, space.mined),
        learns=any(method.needs_outliers for method in run.config.methods.values()),
    )
    return sweep.run(
        inputs,
        settings.model_copy(update={"space": searched}),
        compute=run.config.compute,
        on_progress=run.observer.progress,
    )


def _default_settings(run: Run) -> dict[str, DefaultSetting]:
    """The settings that the chosen ones are compared with; none where nothing was searched.

    Nor of a searched network: its default would be another one to train, embed and judge.
    """
    if not (run.config.sweep.enabled and run.config.compare_defaults):
        return {}
    searched = run.trained.swept
    left_out = set() if searched is None else set(searched.methods)
    return against_default.default_settings(
        {name: method for name, method in run.methods.items() if name not in left_out},
        network_sweep.choices(run),
        run.config.scores,
        num_train=len(run.benchmark.sets["train"]),
    )


def hand_finetune(run: Run) -> FinetuneResult:
    """The heads of the chosen and of the default settings, and what their scores need fitted."""
    defaults = _default_settings(run)
    parts = [_finetuned(run, space, defaults) for space in run.spaces]
    models = tuple(model for part in parts for model in part.energy_models)
    fit_stage.log(models, run.tracker, run.tracking_run)
    return FinetuneResult(
        heads=tuple(head for part in parts for head in part.heads),
        outlier_counts=next((p.outlier_counts for p in parts if p.outlier_counts), None),
        energy_models=models,
    )


def _finetuned(
    run: Run, space: FeatureSpace, every_default: Mapping[str, DefaultSetting]
) -> FinetuneResult:
    """The heads of one space."""
    choices = network_sweep.choices(run)
    defaults = {n: d for n, d in every_default.items() if n in space.methods and 0 in space.seeds}
    jobs = {key: TrainingJob(choices[key.method].setting, key.seed) for key in space.keys}
    every = {**jobs, **against_default.trainings(defaults, num_seeds=len(space.seeds))}
    data = _training_data(space, [job.method for job in every.values()])
    addresses = train_logged(
        every,
        lambda jobs, on_epoch: finetune.train(
            jobs,
            data,
            space.backbone,
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
    fitted = _fitted(run, space, heads, defaults)
    counts = data.outlier_counts
    return FinetuneResult(
        heads=tuple(
            HeadRef(
                key=key,
                address=address,
                fitted={**{name: a for name, (_, a) in fitted[key].items()}, **space.mined},
            )
            for key, address in heads.items()
        ),
        outlier_counts=None if counts is None else tuple(counts.tolist()),
        energy_models=fit_stage.histories([fitted[key] for key in jobs], run.storage),
    )


def _training_data(space: FeatureSpace, methods: Sequence[MethodConfig]) -> TrainingData:
    """Features and labels; with the outliers counted by class where a method asks for it."""
    view = space.sets.for_training()
    data = sweep.training_data(view, methods)
    if not any(method.needs_outlier_counts for method in methods):
        return data
    return replace(data, outlier_counts=outlier_prior.measure(view, space.backbone, space.storage))


def _fitted(
    run: Run,
    space: FeatureSpace,
    heads: Mapping[HeadKey, str],
    defaults: Mapping[str, DefaultSetting],
) -> dict[HeadKey, FittedOfHead]:
    """What the scores of every head need fitted, by name."""
    stage, choices = space.fit_stage, network_sweep.choices(run)
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


def hand_score(run: Run) -> ScoreResult:
    """The heads with the scores that apply to them."""
    choices, defaults = run.swept.methods, _default_settings(run)
    scored: list[ScoredHead] = []
    for space in run.spaces:
        heads = []
        for head in run.finetuned.heads:
            if run.space_of(head.key) is not space:
                continue
            of = choices if head.key.variant == "chosen" else defaults
            kind = space.methods[head.key.method].head.name
            scores = against_default.applicable(kind, of[head.key.method].scores, head.fitted)
            passes = _passes(space, scores, head.fitted)
            heads.append(HeadScores(**dict(head), scores=scores, passes=passes))
        result = score.run(
            heads,
            space.sets,
            run.storage,
            at_once=run.config.compute.at_once,
            on_progress=lambda done, total: run.observer.progress(done, total, "shards"),
        )
        scored += result.heads
    return ScoreResult(heads=tuple(scored))


def _passes(
    space: FeatureSpace, scores: Mapping[str, Params], fitted: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The addresses of what scores with a pass of their own judge, made where it is missing.

    Heads that share a score's record and parameters share a pass over the pixels.
    """
    wanted = [name for name in scores if name in scoring.OWN_PASS]
    return {name: _features_of_pass(space, name, scores[name], fitted) for name in wanted}


def _features_of_pass(
    space: FeatureSpace, name: str, params: Params, fitted: Mapping[str, str]
) -> dict[str, str]:
    """The addresses of the features that one such score judges, by source."""
    run = space.run
    record = load_records(run.storage, {name: fitted[name]})
    caches = embed_pass(
        run.benchmark,
        score.SCORED_ROLES,
        scoring.pixel_pass(name, params, record, space.backbone),
        space.backbone,
        run.storage,
        settings=run.config.embed,
        compute=run.config.compute,
        on_progress=lambda done, total, _: run.observer.progress(done, total, f"images, {name}"),
    )
    return {source: cache.address for source, cache in caches.items()}


def _trainings(run: Run) -> list[HeadTraining]:
    """How the heads of the chosen settings were trained; those that train nothing have none."""
    found = []
    for head in run.finetuned.heads:
        if head.key.variant != "chosen":
            continue
        record = head_cache.read_record(run.storage, head.address)
        if record.best_epoch:
            last = dict(record.history[-1])
            epochs = int(last.pop("epoch"))
            found.append(
                HeadTraining(
                    key=head.key, best_epoch=record.best_epoch, epochs=epochs, figures=last
                )
            )
    return found


def hand_evaluate(run: Run) -> Metrics:
    """The tables of scores; the report is written beside, and MLflow told."""
    from pipelines.report import page as report  # draws: a found run needs none of it

    result, tables = run.swept, score.read_all(run.storage, run.scored)
    choices = {}
    for name, choice in result.methods.items():
        head = run.methods[name].head.name
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
            threshold=run.config.threshold,
            compare=run.config.compare,
            defaults=_default_settings(run),
            trainings=_trainings(run),
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
            maps=functools.partial(maps_of, run),
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
