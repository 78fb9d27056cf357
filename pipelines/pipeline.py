"""All stages in order: embed, sweep, finetune, score, evaluate, register.

A stage reads what earlier ones wrote and writes its own manifest last, so it is done when
`runs/RUN/STAGE.json` exists, and a killed run goes on where it was (`pipelines.run`).
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipelines.backbones import clip
from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.cluster import connect
from pipelines.compute.stamp import stamp
from pipelines.config import UserError, to_yaml
from pipelines.data.benchmarks import Benchmark
from pipelines.embed import leaks
from pipelines.embed import stage as embed
from pipelines.evaluate import against_default
from pipelines.evaluate import stage as evaluate
from pipelines.evaluate.against_default import DefaultSetting
from pipelines.evaluate.metrics import EnergyModelHistory, Facts, MetricRow, Metrics, Rejected
from pipelines.finetune import outlier_prior as prior
from pipelines.finetune import stage as finetune
from pipelines.finetune.cache import load_predictor, read_manifest
from pipelines.finetune.epoch_log import EpochLog
from pipelines.finetune.loop import TrainingData, TrainingJob
from pipelines.fitted import stage as fit_stage
from pipelines.fitted.fit import HeadFits
from pipelines.heads import HEADS
from pipelines.methods import METHODS
from pipelines.ood import SCORES
from pipelines.records import HeadKey, Params
from pipelines.register import choose
from pipelines.register import stage as register
from pipelines.report import page as report
from pipelines.run import Observer, Run
from pipelines.score import by_name as scoring
from pipelines.score import stage as score
from pipelines.score.cache import load_records
from pipelines.settings import PipelineConfig
from pipelines.sweep import record as sweep_record
from pipelines.sweep import stage as sweep
from pipelines.sweep.result import SweepResult


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
        UserError: a set or an earlier stage is missing, and what the stages raise.
    """
    current = Run.open(config, observer)
    for needed in ("train", "validation") if only is None else ():
        if needed not in current.benchmark.sets:
            raise UserError(
                f"benchmark {current.benchmark.name!r} has no set {needed!r}: heads are trained on "
                "train, thresholds are set on validation"
            )
    names = list(STAGES) if only is None else [only]
    if last is not None:
        names = names[: names.index(last) + 1]
    for name in before(names[0]):  # asked before Ray starts
        _refuse_stale(current, name)
    with ExitStack() as stack:
        connected = False
        for number, name in enumerate(names, start=1):
            stage, code = STAGES[name], functools.partial(stage_code, name, config)
            reason = current.reason_to_run(name, code, before(name))
            if reason is None:
                observer.finished(name, 0.0, found=True)
                continue
            if stage.needs_ray and not connected:
                stack.enter_context(connect(config.compute))
                connected = True
            observer.started(name, number, len(names), reason)
            start = time.perf_counter()
            current.finish(name, as_json(stage.run(current)), code(), before(name))
            observer.finished(name, time.perf_counter() - start, found=False)
    return current


def before(stage: str) -> list[str]:
    """The stages before one, in order."""
    return list(itertools.takewhile(lambda name: name != stage, STAGES))


def _refuse_stale(current: Run, name: str) -> None:
    """An earlier stage has to be done, and still true, when a later one runs alone."""
    current.manifest(name)
    code = functools.partial(stage_code, name, current.config)
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
            plugins += [METHODS[method.name], HEADS[method.head.name]]
        plugins += [
            SCORES[part].function if part in SCORES else scoring.FITTED[part]
            for part in scoring.with_parts(config.scores)
            if scoring.JOIN not in part
        ]
    return code_of(*stage.entries, *plugins, alone=[stage.run])


def as_json(record: Mapping[str, Any]) -> bytes:
    """The content of a stage's file."""
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _embed(run: Run) -> dict[str, Any]:
    _write_index(run)
    keys = run.benchmark.keys_by_source()
    caches = embed.embed_sources(
        {name: run.benchmark.sources[name] for name in keys},
        run.backbone,
        run.storage,
        settings=run.config.embed,
        compute=run.config.compute,
        keys=keys,
        on_progress=lambda done, total, rejected: run.observer.progress(
            done, total, f"images, {rejected} rejected" if rejected else "images"
        ),
    )
    leaks.refuse(run.benchmark, caches, run.storage, ("runs", run.id, "shared_images.json"))
    return {
        "benchmark": run.benchmark.name,
        "backbone": dict(clip.identity(run.backbone)),
        "sources": {
            name: {
                "address": cache.address,
                "rows": cache.manifest["rows"],
                "rejected": cache.rejected().to_pylist(),
            }
            for name, cache in caches.items()
        },
    }


def _write_index(run: Run) -> None:
    """Which images train, after shots and imbalance: source, key, label."""
    if "train" in run.benchmark.sets:
        chosen = run.benchmark.sets["train"]
        names = ("source", "key", "label")
        columns = [pa.array(c) for c in (chosen.sources, chosen.keys, chosen.labels)]
        run.storage.write_table(pa.table(columns, names=names), "runs", run.id, "train.parquet")


def _sweep(run: Run) -> dict[str, Any]:
    stage = run.fit_stage if run.config.sweep.enabled else None
    if stage is not None:
        stage.prepare(name for name, space in run.config.sweep.space.items() if space)
    found = sweep.run(
        run.config.methods,
        run.config.scores,
        run.sets,
        run.backbone,
        run.storage,
        settings=run.config.sweep,
        compute=run.config.compute,
        fit_data=stage.data if stage is not None else None,
        records=load_records(run.storage, run.mined),
        on_progress=run.observer.progress,
    )
    if rows := found.pop("surfaces", []):
        table = pa.Table.from_pylist(rows, schema=sweep.SURFACES)
        run.storage.write_table(table, "runs", run.id, "surfaces.parquet")
    place = sweep_record.Place(run.storage, run.id, run.tracker, run.tracking_run)
    sweep_record.keep(place, found, words_again(run.config))
    return found


def words_again(config: PipelineConfig) -> str:
    """The words of the command line that a method's chosen setting needs beside it."""
    again = {
        "benchmark": config.benchmark.name,
        "backbone": config.backbone.name,
        "scores": f"[{','.join(config.scores)}]",
        "seeds": config.seeds,
        "shots": config.shots,
        "imbalance": config.imbalance,
        "target_tpr": config.target_tpr,
    }
    return " ".join(f"{key}={value}" for key, value in again.items() if value is not None)


def _train_and_fit(run: Run) -> dict[str, Any]:
    """The heads, and then what their scores need fitted: addresses by method, seed and name."""
    trained, stage = _finetune(run), run.fit_stage
    heads = [(m, seed, a) for m, found in trained["heads"].items() for seed, a in enumerate(found)]
    defaults = [(m, s, a) for m, found in trained["defaults"].items() for s, a in enumerate(found)]
    fitted: fit_stage.Fitted = [{} for _ in (*heads, *defaults)]
    if stage is not None:
        choices, settings = _sweep_result(run).methods, _default_settings(run)
        fitted = stage.fit_heads(
            [HeadFits(choices[m].setting, seed, a, choices[m].scores) for m, seed, a in heads]
            + [HeadFits(settings[m].method, s, a, settings[m].scores) for m, s, a in defaults]
        )
    models = fit_stage.histories(fitted[: len(heads)], run.storage)
    fit_stage.log(models, run.tracker, run.tracking_run)
    return {
        **trained,
        "records": _records(heads, fitted[: len(heads)], run.mined),
        "default_records": _records(defaults, fitted[len(heads) :], run.mined),
        "energy_models": models,
    }


def _records(
    heads: Iterable[tuple[str, int, str]], fitted: fit_stage.Fitted, mined: Mapping[str, str]
) -> dict[str, list[dict[str, str]]]:
    """Addresses of what was fitted or mined, by method, seed and name."""
    records: dict[str, list[dict[str, str]]] = {}
    for (method, _, _), found in zip(heads, fitted, strict=True):
        fitted_here = {name: a for name, (_, a) in found.items()}
        records.setdefault(method, []).append({**fitted_here, **mined})
    return records


def _sweep_result(run: Run) -> SweepResult:
    run.manifest("sweep")
    place = ("runs", run.id, "sweep.json")
    return SweepResult.from_json(run.storage.read_bytes(*place), run.storage.path(*place))


def _default_settings(run: Run) -> dict[str, DefaultSetting]:
    """The settings that the chosen ones are compared with; none where nothing was searched."""
    if not (run.config.sweep.enabled and run.config.compare_defaults):
        return {}
    return against_default.default_settings(
        run.config.methods,
        _sweep_result(run).methods,
        run.config.scores,
        num_train=len(run.benchmark.sets["train"]),
    )


def _finetune(run: Run) -> dict[str, Any]:
    choices = _sweep_result(run).methods
    cells = {
        HeadKey(method=name, seed=seed): TrainingJob(choices[name].setting, seed)
        for name in run.config.methods
        for seed in range(run.config.seeds)
    }
    defaults = _default_settings(run)
    cells |= against_default.trainings(defaults, num_seeds=run.config.seeds)
    total = sum(c.method.training.epochs for c in cells.values() if c.method.head.trainable)
    seen: set[tuple[str, float]] = set()
    log = EpochLog(lambda name: run.tracker.run(name, parent=run.tracking_run))

    def on_epoch(cell: TrainingJob, report: Mapping[str, float]) -> None:
        # Methods with the same setting share a cell; it is shown under the first one's name.
        name = next(_training_name(key) for key, known in cells.items() if known == cell)
        seen.add((name, report["epoch"]))
        run.observer.progress(len(seen), total, f"epochs, {name}")
        log.add(name, report)

    data = _training_data(run, cells.values())
    addresses = finetune.train(
        list(cells.values()),
        data,
        run.backbone,
        run.storage,
        compute=run.config.compute,
        mode=run.config.training,
        on_epoch=on_epoch,
    )
    trained = dict(zip(cells, addresses, strict=True))
    for key, address in trained.items():
        _log_training(run, log, key, address)
    heads: dict[str, list[str]] = {name: [] for name in run.config.methods}
    for key, address in trained.items():
        if key.variant == "chosen":
            heads[key.method].append(address)
    of_default: dict[str, list[str]] = {}
    for key, address in against_default.default_heads(defaults, trained).items():
        of_default.setdefault(key.method, []).append(address)
    counts = data.outlier_counts
    return {
        "heads": heads,
        "defaults": of_default,
        "outlier_counts": None if counts is None else counts.tolist(),
    }


def _training_data(run: Run, cells: Iterable[TrainingJob]) -> TrainingData:
    """Features and labels; with the outliers counted by class where a method asks for it."""
    view, methods = run.sets.for_training(), [cell.method for cell in cells]
    data = sweep.training_data(view, methods)
    if not any(method.needs_outlier_counts for method in methods):
        return data
    return replace(data, outlier_counts=prior.measure(view, run.backbone, run.storage))


def _training_name(key: HeadKey) -> str:
    """The name of a training, in MLflow and on the terminal."""
    return f"finetune {key}"


def _log_training(run: Run, log: EpochLog, key: HeadKey, address: str) -> None:
    """The settings of a training, and the epochs that were not sent while it went on."""
    with run.tracker.run(_training_name(key), parent=run.tracking_run) as active:
        active.log_params({"method": key.method, "seed": key.seed, "address": address})
    log.finish(_training_name(key), read_manifest(run.storage, address)["history"])


def _score_folder(key: HeadKey) -> str:
    name = f"{key.method}-{key.seed}"
    return name if key.variant == "chosen" else f"{name}-default"


def _score(run: Run) -> dict[str, Any]:
    choices, settings, records = _sweep_result(run).methods, _default_settings(run), run.records
    manifest = run.manifest("finetune")
    heads = []
    for (method, seed), address in run.heads.items():
        key, params = HeadKey(method=method, seed=seed), choices[method].scores
        heads.append(_to_score(run, key, address, params, records[method][seed]))
    for method, addresses in manifest["defaults"].items():
        for seed, address in enumerate(addresses):
            key = HeadKey(method=method, seed=seed, variant="default")
            fitted = manifest["default_records"][method][seed]
            heads.append(_to_score(run, key, address, settings[method].scores, fitted))
    names = score.run(
        heads,
        run.sets,
        run.storage,
        run.id,
        at_once=run.config.compute.at_once,
        on_progress=lambda done, total: run.observer.progress(done, total, "shards"),
    )
    return {"scores": names}


def _to_score(
    run: Run, key: HeadKey, address: str, params: Mapping[str, Params], fitted: Mapping[str, str]
) -> score.HeadScores:
    head = run.config.methods[key.method].head.name
    known = against_default.applicable(head, params, fitted)
    return score.HeadScores(_score_folder(key), address, known, fitted)


def _tables(run: Run) -> dict[HeadKey, pa.Table]:
    """The scores of every head, those of the default settings among them."""
    defaults = run.manifest("finetune")["defaults"]
    keys = [HeadKey(method=method, seed=seed) for method, seed in run.heads]
    keys += [
        HeadKey(method=method, seed=seed, variant="default")
        for method, heads in defaults.items()
        for seed in range(len(heads))
    ]
    return {key: score.read(run.storage, run.id, _score_folder(key)) for key in keys}


def _facts(run: Run) -> Facts:
    sources = run.manifest("embed")["sources"]
    return Facts(
        benchmark=run.benchmark.name,
        backbone=run.config.backbone.name,
        class_names=run.benchmark.class_names,
        notes=run.benchmark.notes,
        sets={name: len(chosen) for name, chosen in run.benchmark.sets.items()},
        rejected=tuple(
            Rejected(source=name, **entry)
            for name, source in sources.items()
            for entry in source["rejected"]
        ),
    )


def _evaluate(run: Run) -> dict[str, Any]:
    run.manifest("score")
    tables, sweep_result, records = _tables(run), _sweep_result(run), run.records
    choices = {}
    for name, choice in sweep_result.methods.items():
        head = run.config.methods[name].head.name
        known = against_default.applicable(head, choice.scores, records[name][0])
        # JSON keeps keys sorted, the user did not.
        ordered = {score: known[score] for score in run.config.scores if score in known}
        choices[name] = choice.model_copy(update={"scores": ordered})
    metrics = evaluate.run(
        tables,
        evaluate.Evaluation(
            facts=_facts(run),
            criterion=sweep_result.criterion,
            choices=choices,
            target_tpr=run.config.target_tpr,
            settings=run.config.evaluate,
            compare=run.config.compare,
            defaults=_default_settings(run),
            energy_models=[
                EnergyModelHistory.model_validate(model)
                for model in run.manifest("finetune")["energy_models"]
            ],
        ),
        on_progress=lambda done, total: run.observer.progress(done, total, "rows"),
    )
    run.storage.write_bytes(metrics.to_json(), "runs", run.id, "metrics.json")
    _write_report(run, metrics, tables, sweep_result)
    return {"report": run.storage.path("runs", run.id, "report.html")}


def _write_report(
    run: Run, metrics: Metrics, tables: Mapping[HeadKey, pa.Table], sweep_result: SweepResult
) -> None:
    page = report.write(
        metrics,
        report.ReportInputs(
            scores=tables,
            config_yaml=to_yaml(run.config),
            stamp=stamp(run=run.id),
            sweep=sweep_result,
            surfaces=sweep_record.surfaces(run.storage, run.id),
            image=lambda set_name, key: image(run.benchmark, set_name, key),
        ),
    )
    run.storage.write_bytes(page.encode(), "runs", run.id, "report.html")
    with run.tracker.run("", run_id=run.tracking_run) as active:
        for row in metrics.rows:
            active.log_metrics(_row_figures(row))
        for name in ("report.html", "metrics.json", "sweep.json", "config.yaml"):
            content = run.storage.read_bytes("runs", run.id, name).decode()
            active.log_text(content, name)


def image(benchmark: Benchmark, set_name: str, key: str) -> bytes | None:
    """The encoded image of a set's key, or None where it cannot be read."""
    chosen = benchmark.sets[set_name]
    source = benchmark.sources[chosen.sources[chosen.keys.index(key)]]
    (content,) = source.read([key])
    return content if isinstance(content, bytes) else None


def _row_figures(row: MetricRow) -> dict[str, float]:
    prefix = f"{row.method}/{row.score}"
    figures = {f"{prefix}/id_accuracy": row.id_accuracy.mean}
    if row.ood_accuracy is not None:
        figures[f"{prefix}/ood_accuracy"] = row.ood_accuracy.mean
    for metric, by_group in (("auroc", row.auroc), ("fpr", row.fpr)):
        figures |= {f"{prefix}/{metric}/{group}": v.mean for group, v in by_group.items()}
    return figures


def _register(run: Run) -> dict[str, Any]:
    run.manifest("evaluate")
    place = ("runs", run.id, "metrics.json")
    metrics = Metrics.from_json(run.storage.read_bytes(*place), run.storage.path(*place))
    method, name = choose.champion(
        run.config.methods,
        run.config.scores,
        _sweep_result(run).methods,
        run.config.register_as,
        accuracy_tolerance=run.config.sweep.accuracy_tolerance,
    )
    row = metrics.row(method, name)
    addresses = run.records[method][0]
    needed = {record: addresses[record] for record in scoring.records_read(name)}
    candidate = register.Candidate(
        predictor=load_predictor(run.storage, run.heads[method, 0]),
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
    done = register.register(
        candidate, run.tracker, run.tracking_run, settings=run.config.register_as
    )
    return done.model_dump(mode="json")


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        run: gives the content of the stage's file; it hands `entries` what they work on.
        entries: where the computation starts.
        uses_plugins: whether heads, methods and scores decide what it gives.
        needs_ray: whether Ray has to run.
    """

    run: Callable[[Run], dict[str, Any]]
    entries: tuple[Entry, ...]
    uses_plugins: bool = True
    needs_ray: bool = True


STAGES: dict[str, Stage] = {
    "embed": Stage(_embed, (embed.embed_sources, leaks.refuse), uses_plugins=False),
    "sweep": Stage(_sweep, (sweep.run, sweep_record.keep)),
    "finetune": Stage(
        _train_and_fit,
        (finetune.train, fit_stage.FitStage, prior.measure, against_default.default_settings),
    ),
    "score": Stage(_score, (score.run,)),
    "evaluate": Stage(
        _evaluate,
        (evaluate.run, report.write),
        uses_plugins=False,
        needs_ray=False,
    ),
    "register": Stage(_register, (register.register, choose.champion), needs_ray=False),
}
