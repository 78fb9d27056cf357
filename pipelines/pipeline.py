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

from pipelines import default_heads, tracking
from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.cluster import connect
from pipelines.config import UserError, to_yaml
from pipelines.data.benchmarks import Benchmark
from pipelines.embed import stage as embed
from pipelines.evaluate import stage as evaluate
from pipelines.finetune import outlier_prior as prior
from pipelines.finetune import stage as finetune
from pipelines.finetune.cache import load_predictor, read_record
from pipelines.finetune.epoch_log import EpochLog
from pipelines.finetune.loop import TrainingData, TrainingJob
from pipelines.fitted import stage as fit_stage
from pipelines.fitted.fit import HeadToFit
from pipelines.heads import HEADS
from pipelines.methods import METHODS
from pipelines.records import HeadKey
from pipelines.register import stage as register
from pipelines.report import page as report
from pipelines.run import Observer, Run
from pipelines.score import by_name as scoring
from pipelines.score import stage as score
from pipelines.score.cache import load_records
from pipelines.score.code import score_rows_used
from pipelines.score.result import HeadScores, ScoreResult
from pipelines.settings import PipelineConfig
from pipelines.sweep import record as sweep_record
from pipelines.sweep import stage as sweep


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
            plugins += [
                METHODS[method.name].Config.__module__,
                HEADS[method.head.name].Config.__module__,
            ]
        plugins += score_rows_used(config.scores)
    return code_of(*stage.entries, *plugins, alone=[stage.run])


def as_json(record: Mapping[str, Any]) -> bytes:
    """The content of a stage's file."""
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _embed(run: Run) -> dict[str, Any]:
    _write_index(run)
    result = embed.embed_benchmark(
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
    return result.model_dump(mode="json")


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
        chosen, standing = run.manifest("sweep")["methods"], default_heads.compared(run)
        settings = {name: sweep.parse_method(chosen[name]["setting"]) for name in trained["heads"]}
        fitted = stage.fit_heads(
            [HeadToFit(settings[m], seed, a, chosen[m]["scores"]) for m, seed, a in heads]
            + [HeadToFit(standing[m].method, s, a, standing[m].scores) for m, s, a in defaults]
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


def _finetune(run: Run) -> dict[str, Any]:
    chosen = run.manifest("sweep")["methods"]
    cells = {
        (name, seed): TrainingJob(sweep.parse_method(chosen[name]["setting"]), seed)
        for name in run.config.methods
        for seed in range(run.config.seeds)
    }
    cells |= default_heads.to_train(run)
    total = sum(c.method.training.epochs for c in cells.values() if c.method.head.trainable)
    seen: set[tuple[str, float]] = set()
    log = EpochLog(lambda name: run.tracker.run(name, parent=run.tracking_run))

    def on_epoch(cell: TrainingJob, report: Mapping[str, float]) -> None:
        # Methods with the same setting share a cell; it is shown under the first one's name.
        name = next(_training_name(*place) for place, known in cells.items() if known == cell)
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
    heads: dict[str, list[str]] = {}
    for place, address in zip(cells, addresses, strict=True):
        heads.setdefault(place[0], []).append(address)
        _log_training(run, log, place, address)
    counts = data.outlier_counts
    return {
        **default_heads.apart(run, heads),
        "outlier_counts": None if counts is None else counts.tolist(),
    }


def _training_data(run: Run, cells: Iterable[TrainingJob]) -> TrainingData:
    """Features and labels; with the outliers counted by class where a method asks for it."""
    view, methods = run.sets.for_training(), [cell.method for cell in cells]
    data = sweep.training_data(view, methods)
    if not any(method.needs_outlier_counts for method in methods):
        return data
    return replace(data, outlier_counts=prior.measure(view, run.backbone, run.storage))


def _training_name(method: str, seed: int) -> str:
    """The name of a training, in MLflow and on the terminal."""
    return f"finetune {method} seed {seed}"


def _log_training(run: Run, log: EpochLog, place: tuple[str, int], address: str) -> None:
    """The settings of a training, and the epochs that were not sent while it went on."""
    method, seed = place
    with run.tracker.run(_training_name(method, seed), parent=run.tracking_run) as active:
        active.log_params({"method": method, "seed": seed, "address": address})
    log.finish(_training_name(method, seed), read_record(run.storage, address).history)


def _score(run: Run) -> dict[str, Any]:
    chosen = run.manifest("sweep")["methods"]
    records = run.records
    heads = [
        HeadScores(
            key=HeadKey(method=m, seed=seed),
            address=address,
            fitted=records[m][seed],
            scores=default_heads.fitting(run, m, chosen[m]["scores"], records[m][seed]),
        )
        for (m, seed), address in run.heads.items()
    ]
    heads += default_heads.to_score(run)
    result = score.run(
        heads,
        run.sets,
        run.storage,
        at_once=run.config.compute.at_once,
        on_progress=lambda done, total: run.observer.progress(done, total, "shards"),
    )
    return result.model_dump(mode="json")


def score_tables(run: Run) -> dict[HeadKey, pa.Table]:
    """The scores of every head."""
    return score.read_all(run.storage, ScoreResult.model_validate(run.manifest("score")))


def _evaluate(run: Run) -> dict[str, Any]:
    every = score_tables(run)
    tables = {(m, seed): every[HeadKey(method=m, seed=seed)] for m, seed in run.heads}
    chosen = run.manifest("sweep")
    sources = run.manifest("embed")["sources"]
    facts = {
        "benchmark": run.benchmark.name,
        "backbone": run.config.backbone.name,
        "class_names": list(run.benchmark.class_names),
        "notes": run.benchmark.notes,
        "sets": {name: len(chosen) for name, chosen in run.benchmark.sets.items()},
        "rejected": [{"source": n, **r} for n, s in sources.items() for r in s["rejected"]],
    }
    records = run.records
    for name, method in chosen["methods"].items():
        known = default_heads.fitting(run, name, method["scores"], records[name][0])
        # JSON keeps keys sorted, the user did not.
        method["scores"] = {score: known[score] for score in run.config.scores if score in known}
    metrics = evaluate.run(
        tables,
        chosen,
        facts,
        target_tpr=run.config.target_tpr,
        settings=run.config.evaluate,
        on_progress=lambda done, total: run.observer.progress(done, total, "rows"),
    )
    metrics["best_against_default"] = default_heads.rows(run, every, chosen["methods"])
    metrics["energy_models"] = run.manifest("finetune").get("energy_models", [])
    run.storage.write_json(metrics, "runs", run.id, "metrics.json")
    _write_report(run, metrics, tables, chosen)
    return {"report": run.storage.path("runs", run.id, "report.html")}


def _write_report(
    run: Run, metrics: Mapping[str, Any], tables: Mapping[tuple[str, int], Any], chosen: Any
) -> None:
    stamp = tracking.stamp(run=run.id)
    page = report.write(
        metrics,
        tables,
        sweep=chosen,
        config_yaml=to_yaml(run.config),
        stamp=stamp,
        surfaces=sweep_record.surfaces(run.storage, run.id),
        image=lambda set_name, key: image(run.benchmark, set_name, key),
    )
    run.storage.write_bytes(page.encode(), "runs", run.id, "report.html")
    with run.tracker.run("", run_id=run.tracking_run) as active:
        for row in metrics["rows"]:
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


def _row_figures(row: Mapping[str, Any]) -> dict[str, float]:
    prefix = f"{row['method']}/{row['score']}"
    figures = {f"{prefix}/id_accuracy": row["id_accuracy"]["mean"]}
    if "ood_accuracy" in row:
        figures[f"{prefix}/ood_accuracy"] = row["ood_accuracy"]["mean"]
    for metric in ("auroc", "fpr"):
        for group, value in row[metric].items():
            figures[f"{prefix}/{metric}/{group}"] = value["mean"]
    return figures


def _register(run: Run) -> dict[str, Any]:
    run.manifest("evaluate")
    metrics = dict(run.storage.read_json("runs", run.id, "metrics.json"))
    method, name = champion(run)
    row = next(r for r in metrics["rows"] if (r["method"], r["score"]) == (method, name))
    addresses = run.records[method][0]
    needed = {record: addresses[record] for record in scoring.records_read(name)}
    candidate = register.Candidate(
        predictor=load_predictor(run.storage, run.heads[method, 0]),
        backbone=run.backbone,
        method=method,
        score=name,
        params=row["params"],
        threshold=row["threshold"]["value"],
        target_tpr=run.config.target_tpr,
        class_names=run.benchmark.class_names,
        decoding=run.config.embed.decoding(),
        batch_size=run.config.embed.batch_size,
        facts={
            "run": run.id,
            "benchmark": run.benchmark.name,
            "threshold_low": f"{row['threshold']['low']:.9g}",
            "threshold_high": f"{row['threshold']['high']:.9g}",
            "threshold_images": str(row["threshold"]["num"]),
        },
        records=load_records(run.storage, needed),
    )
    done = register.register(
        candidate, run.tracker, run.tracking_run, settings=run.config.register_as
    )
    return {
        "name": done.name,
        "version": done.version,
        "uri": done.uri,
        "method": method,
        "score": name,
        "params": row["params"],
        "threshold": row["threshold"],
    }


def champion(run: Run) -> tuple[str, str]:
    """The method and score to register, chosen on validation data only.

    Among methods whose ID validation accuracy is within the sweep's tolerance of the best, the
    pair with the highest validation AUROC; without a sweep the last method's own score.
    """
    wanted = run.config.register_as
    found = run.manifest("sweep")["methods"]
    judged = {m: f for m, f in found.items() if f["validation"]}
    if wanted.method != "auto":
        if wanted.method not in found:
            raise UserError(
                f"register_as.method={wanted.method}: not in this run; "
                f"allowed: auto, {', '.join(found)}"
            )
        judged = {m: f for m, f in judged.items() if m == wanted.method}
    if wanted.score != "auto" and wanted.score not in run.config.scores:
        raise UserError(
            f"register_as.score={wanted.score}: not in this run; "
            f"allowed: auto, {', '.join(run.config.scores)}"
        )
    if not judged:
        method = list(run.config.methods)[-1] if wanted.method == "auto" else wanted.method
        own, head = run.config.methods[method].score, run.config.methods[method].head.name
        known = [score for score in run.config.scores if scoring.applies(score, head)]
        own = own if own in known else (known or run.config.scores)[0]
        return method, own if wanted.score == "auto" else wanted.score
    floor = max(f["accuracy"] for f in judged.values()) - run.config.sweep.accuracy_tolerance
    pairs = [
        (figures["auroc"], -figures["fpr"], method, name)
        for method, f in judged.items()
        if f["accuracy"] >= floor
        for name, figures in f["validation"].items()
        if wanted.score in ("auto", name)
    ]
    _, _, method, name = max(pairs, key=lambda pair: pair[:2])
    return method, name


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
    "embed": Stage(_embed, (embed.embed_benchmark,), uses_plugins=False),
    "sweep": Stage(_sweep, (sweep.run, sweep_record.keep)),
    "finetune": Stage(
        _train_and_fit, (finetune.train, fit_stage.FitStage, prior.measure, default_heads.compared)
    ),
    "score": Stage(_score, (score.run,)),
    "evaluate": Stage(
        _evaluate,
        (evaluate.run, report.write, default_heads.rows),
        uses_plugins=False,
        needs_ray=False,
    ),
    "register": Stage(_register, (register.register, champion), needs_ray=False),
}
