"""All stages in order: train (where a method asks for it), embed, sweep, finetune and the rest.

A stage reads the records of earlier ones and writes its own. It is found where its stamp is still
true (`pipelines.run`), so a killed run goes on where it was, and a stage whose code changed is
repeated. The functions of `stages` hand each stage what it works on; `STAGES` is their order.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.cluster import connect
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.embed.benchmark import embed_benchmark
from pipelines.evaluate import against_default
from pipelines.evaluate import stage as evaluate
from pipelines.finetune import outlier_prior
from pipelines.finetune import stage as finetune
from pipelines.fitted import stage as fit_stage
from pipelines.heads import HEADS
from pipelines.methods import METHODS
from pipelines.pipeline import stages
from pipelines.pipeline.networks import hand_train
from pipelines.pipeline.registration import hand_register
from pipelines.records import StoredRecord
from pipelines.register import choose
from pipelines.register import stage as register
from pipelines.register.detector import Detector
from pipelines.run import Run
from pipelines.run.observer import Observer
from pipelines.score import stage as score
from pipelines.score.code import score_rows_used
from pipelines.score.patches import patch_maps
from pipelines.settings.config import PipelineConfig, searched_networks
from pipelines.store.errors import damaged_in
from pipelines.store.locks import locked
from pipelines.store.registry import working
from pipelines.sweep import networks as sweep_networks
from pipelines.sweep import record as sweep_record
from pipelines.sweep import stage as sweep
from pipelines.train import images, prior
from pipelines.train import stage as train

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
    config = current.config
    for needed in ("train", "validation") if only is None else ():
        if needed not in current.benchmark.sets:
            raise UserError(
                f"benchmark {current.benchmark.name!r} has no set {needed!r}: heads are trained on "
                "train, thresholds are set on validation"
            )
    if only == "train" and not current.trains:
        raise UserError(
            "no method of this run trains a whole network: methods=[network_energy] and the like "
            "do, or methods.NAME.head={name: classifier, train: {start: backbone}}"
        )
    names = stages_of(config) if only is None else [only]
    if last is not None:
        names = names[: names.index(last) + 1]
    with ExitStack() as stack:
        with_ray = functools.cache(lambda: stack.enter_context(connect(config.compute)))
        for _ in range(MOST_MENDED):
            try:
                return _run_stages(current, names, with_ray)
            except Exception as error:
                damaged = damaged_in(error)
                if damaged is None:
                    raise
                current = current.mended(damaged)
        return _run_stages(current, names, with_ray)


def _run_stages(current: Run, names: Sequence[str], with_ray: Callable[[], object]) -> Run:
    """Run those of the stages that are not done."""
    for name in before(names[0], current.config):  # asked before Ray starts
        _refuse_stale(current, name)
    for number, name in enumerate(names, start=1):
        stage, code = STAGES[name], functools.partial(stage_code, name, current.config)
        reason = current.reason_to_run(name, code, before(name, current.config))
        if reason is None and name == "register":
            reason = current.reason_to_register
        if reason is None:
            current.observer.finished(name, 0.0, found=True)
            continue
        current.observer.started(name, number, len(names), reason)
        if stage.needs_ray(current.config):
            with_ray()
        start = time.perf_counter()
        current.finish(name, stage.run(current).to_json(), code(), before(name, current.config))
        current.observer.finished(name, time.perf_counter() - start, found=False)
    return current


def stages_of(config: PipelineConfig) -> list[str]:
    """The stages of a run, in order; nothing is trained end to end where no method asks for it."""
    trains = any(method.network is not None for method in config.methods.values())
    return [name for name in STAGES if name != "train" or trains]


def before(stage: str, config: PipelineConfig) -> list[str]:
    """The stages before one, in order."""
    return list(itertools.takewhile(lambda name: name != stage, stages_of(config)))


def _refuse_stale(current: Run, name: str) -> None:
    """An earlier stage has to be done, and still true, when a later one runs alone."""
    code = functools.partial(stage_code, name, current.config)
    if not current.has(name):
        raise UserError(
            f"run {current.id} has no {name} yet: run python -m jobs.{name} (or jobs.pipeline) "
            "with the same words first"
        )
    if reason := current.reason_to_run(name, code, before(name, current.config)):
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
            if name == "train" and method.network is None:
                continue
            modules = METHODS[method.name], HEADS[method.head.name]
            plugins += [module.Config.__module__ for module in modules]
        searches = name == "train" and bool(searched_networks(config))
        if searches:
            plugins.append(sweep_networks.run)
        if searches or name != "train":
            plugins += score_rows_used(config.scores)
    return code_of(*stage.entries, *plugins, alone=[stage.run])


def _always(_: PipelineConfig) -> bool:
    return True


def _never(_: PipelineConfig) -> bool:
    return False


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        run: gives the record of the stage; it hands `entries` what they work on.
        entries: where the computation starts.
        uses_plugins: whether heads, methods and scores decide what it gives.
        needs_ray: whether Ray has to run, under a configuration.
    """

    run: Callable[[Run], StoredRecord]
    entries: tuple[Entry, ...]
    uses_plugins: bool = True
    needs_ray: Callable[[PipelineConfig], bool] = _always


STAGES: dict[str, Stage] = {
    "train": Stage(
        hand_train,
        (train.train, prior.measure, images.make),
        needs_ray=lambda config: config.training == "ray" or bool(searched_networks(config)),
    ),
    "embed": Stage(stages.hand_embed, (embed_benchmark,), uses_plugins=False),
    "sweep": Stage(stages.hand_sweep, (sweep.run, sweep_record.keep)),
    "finetune": Stage(
        stages.hand_finetune,
        (finetune.train, fit_stage.FitStage, outlier_prior.measure, against_default.trainings),
    ),
    "score": Stage(stages.hand_score, (score.run,)),
    "evaluate": Stage(
        stages.hand_evaluate,
        (evaluate.run, score.read_all, "pipelines.report.page.write", patch_maps),
        uses_plugins=False,
        needs_ray=_never,
    ),
    "register": Stage(
        hand_register,
        (register.register, choose.champion, Detector.judge_images, Detector.judge_features),
        needs_ray=_never,
    ),
}
