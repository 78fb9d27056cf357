"""Running trials with Ray Tune: settings known beforehand, or proposed and stopped on the way.

`run_known` takes a grid's or a random search's settings: every trial runs to its end. `run_live`
is for a scheduler that stops weak trials early and for Optuna, which proposes the next setting
from what came out. In both a trial is a function on features that lie once in Ray's object store,
and workers are used again. What is finished is a file (`pipelines.sweep.trial`), so a sweep that
was killed goes on where it was, without Tune's own state.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.finetune.together import shape_of
from pipelines.score import search as posthoc
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep.space import SAMPLERS, parse_method, rounded
from pipelines.sweep.trial import Record, Shared, Spec

# (trials done, in all, a note)
Progress = Callable[[int, int, str], None]
MakeSpec: TypeAlias = Callable[[Mapping[str, Any]], Spec]

# Settings trained as one batched model; more gain little and are lost together.
MOST_TOGETHER = 16
TIME_IS_UP = "not run: the sweep's time was up"
# What is reported of a setting that failed: the worst of everything.
_WORST = {"accuracy": 0.0, "auroc": 0.0, "fpr": 1.0}
_MODES = {"accuracy": "max", "auroc": "max", "fpr": "min"}


@dataclass(frozen=True)
class Search:
    """How the trials of one method are proposed and stopped.

    Attributes:
        method: its name in tables.
        settings: the values tried, where they are known beforehand.
        space: dotted keys and samplers, for Optuna; empty where `settings` are known.
        num_samples: trials in all.
        scheduler: what stops trials early.
        objectives: what Optuna looks at; a scheduler compares by the first.
        grace_epochs: epochs before a trial may be stopped.
        max_epochs: of the longest training.
        seed: of Optuna's draws.
    """

    method: str
    settings: Sequence[Mapping[str, Any]]
    space: Mapping[str, Any]
    num_samples: int
    scheduler: Literal["none", "asha", "median"]
    objectives: tuple[str, ...]
    grace_epochs: int
    max_epochs: int
    seed: int


@dataclass
class Live:
    """What the terminal is told: trials done, running and failed, the best so far."""

    total: int
    report: Progress | None
    done: int = 0
    failed: int = 0
    running: int = 0
    best: tuple[float, str] | None = None

    def add(self, method: str, figures: Mapping[str, Any]) -> None:
        """One trial more is finished."""
        self.done += 1
        if figures.get("failed"):
            self.failed += 1
        elif self.best is None or figures["auroc"] > self.best[0]:
            self.best = (float(figures["auroc"]), method)
        self.show()

    def show(self) -> None:
        """Tell the observer."""
        if self.report is None:
            return
        notes = ["trials"]
        if self.running:
            notes.append(f"{self.running} running")
        if self.failed:
            notes.append(f"{self.failed} failed")
        if self.best is not None:
            notes.append(f"best AUROC {self.best[0]:.3f} ({self.best[1]})")
        self.report(self.done, self.total, ", ".join(notes))


@dataclass
class _Watch(ray.tune.Callback):
    """Carries what workers report to the live view; one Tune trial may be several of ours."""

    live: Live
    left: dict[str, int] = field(default_factory=dict)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self.left[trial.trial_id] = len(trial.config.get("specs", [None]))
        self._show()

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        if result.get("finished"):
            self.left[trial.trial_id] -= 1
            self.live.running = sum(self.left.values())
            self.live.add(result["method"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self.live.done += self.left.pop(trial.trial_id, 0)  # stopped early
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self.left.pop(trial.trial_id, None)
        self._show()

    def _show(self) -> None:
        self.live.running = sum(self.left.values())
        self.live.show()


@dataclass
class Budget:
    """The wall-clock time that a sweep may take."""

    seconds: float | None
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Seconds left, at least one; None: no limit."""
        if self.seconds is None:
            return None
        return max(1.0, self.seconds - (time.monotonic() - self.began))

    @property
    def is_spent(self) -> bool:
        """Whether the time is up."""
        return self.seconds is not None and time.monotonic() - self.began >= self.seconds


def run_known(
    specs: Sequence[Spec], shared: Shared, *, compute: ComputeConfig, budget: Budget, live: Live
) -> dict[str, str]:
    """Run trials to their end; returns why, by address, a trial has no record.

    Settings that can be are trained together. What a dead worker left is tried once more, each
    setting alone.
    """
    reasons: dict[str, str] = {}
    waiting, groups = list(specs), _groups(specs, compute)
    for _ in range(2):
        if not waiting or budget.is_spent:
            break
        results = fit(
            ray.tune.with_parameters(_known_trial, shared=shared),
            {"specs": ray.tune.grid_search(groups)},
            compute,
            budget,
            live,
        )
        errors = {
            spec["address"]: _why(result.error)
            for result in results
            if result.error is not None
            for spec in result.config["specs"]
        }
        waiting = [s for s in waiting if not sweep_trial.has_record(shared.storage, s["address"])]
        reasons = {s["address"]: errors[s["address"]] for s in waiting if s["address"] in errors}
        waiting = [s for s in waiting if s["address"] in reasons]
        groups = [[spec] for spec in waiting]
    live.failed += len(waiting)
    for spec in specs:
        if not sweep_trial.has_record(shared.storage, spec["address"]):
            reasons.setdefault(spec["address"], TIME_IS_UP)
    return reasons


def _groups(specs: Sequence[Spec], compute: ComputeConfig) -> list[list[Spec]]:
    """What one worker does at a time: settings of one shape together, others alone.

    No group is so large that a worker would have nothing to do meanwhile.
    """
    shapes: dict[str, list[Spec]] = {}
    for spec in specs:
        alone = "problem" in spec
        shape = None if alone else shape_of(parse_method(spec["config"]))
        shapes.setdefault(shape or spec["address"], []).append(spec)
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = compute.at_once or int(resources.get("CPU", 1))
    found = []
    for same in shapes.values():
        size = min(MOST_TOGETHER, -(-len(same) // workers))
        found += [same[start : start + size] for start in range(0, len(same), size)]
    return found


def _known_trial(config: dict[str, Any], shared: Shared) -> None:
    """What a Tune worker runs: trainings, every post-hoc setting, one file each."""
    specs = config["specs"]
    if len(specs) == 1:
        ray.tune.report(_summary(sweep_trial.run(specs[0], shared), specs[0]))
        return
    for spec, record in sweep_trial.run_together(specs, shared):
        ray.tune.report(_summary(record, spec))


def _summary(record: Record, spec: Spec) -> dict[str, Any]:
    """The figures of a finished trial for the live view, schedulers and Optuna."""
    known = {"finished": True, "method": spec["method"], "epoch": 10**9}
    if record["status"] == "failed":
        return {**known, **_WORST, "failed": True}
    return {**known, **own_figures(record, spec["config"]["score"]), "failed": False}


def own_figures(record: Record, score: str) -> dict[str, float]:
    """Accuracy, AUROC and FPR of a trial by the method's own score, or their mean without it."""
    found = record["scores"]
    judged = [f for f in found.values() if "auroc" in f]
    rows = [found[score]] if "auroc" in found.get(score, {}) else judged
    return {
        "accuracy": record["accuracy"],
        **{name: sum(f[name] for f in rows) / max(1, len(rows)) for name in ("auroc", "fpr")},
    }


def run_live(
    search: Search,
    make_spec: MakeSpec,
    shared: Shared,
    *,
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
) -> list[tuple[Spec, Record]]:
    """Run one method's trials under a scheduler or Optuna; every trial with its record.

    A trial that was stopped early has the figures of its last epoch.
    """
    known = list(search.settings)
    values: Any = ray.tune.grid_search(known) if known else _domains(search.space)
    metric, mode = search.objectives[0], _MODES[search.objectives[0]]
    results = fit(
        ray.tune.with_parameters(_live_trial, shared=shared, make_spec=make_spec),
        {"values": values},
        compute,
        budget,
        live,
        num_samples=1 if known else search.num_samples,
        scheduler=_scheduler(search, metric, mode),
        search_alg=None if known else _optuna(search),
    )
    found = []
    for result in results:
        spec = make_spec(_in_order(result.config["values"]))
        found.append((spec, _live_record(result, spec, shared)))
    return found


def _live_record(result: Any, spec: Spec, shared: Shared) -> Record:
    if sweep_trial.has_record(shared.storage, spec["address"]):
        return sweep_trial.read_record(shared.storage, spec["address"])
    if result.error is not None:
        return {**sweep_trial.failed(result.error, 0.0), "reason": _why(result.error)}
    figures = result.metrics or {}
    if "auroc" not in figures:
        return sweep_trial.failed(UserError(TIME_IS_UP), 0.0)
    score = spec["config"]["score"]
    own = {"params": {}, "auroc": figures["auroc"], "fpr": figures["fpr"], "tried": 0}
    return {
        "status": "stopped",
        "reason": f"stopped after epoch {figures['epoch']}",
        "accuracy": figures["accuracy"],
        "scores": {score: own},
        "surface": {},
        "best_epoch": 0,
        "seconds": round(figures.get("time_total_s", 0.0), 3),
    }


def _live_trial(config: dict[str, Any], shared: Shared, make_spec: MakeSpec) -> None:
    """What a Tune worker runs: a report an epoch, so that a scheduler can stop it."""
    spec = make_spec(_in_order(config["values"]))
    method = parse_method(spec["config"])
    score = _followed(method.score, shared.scores)

    def on_head(epoch: int, head: Any) -> None:
        if epoch < method.training.epochs:
            figures = sweep_trial.own_figures(head, score, shared)
            ray.tune.report({"epoch": epoch, "finished": False, **figures})

    ray.tune.report(_summary(sweep_trial.run(spec, shared, on_head), spec))


def _followed(own: str, scores: Sequence[str]) -> str:
    """The score that is looked at after each epoch: the method's own, if similarities give it."""
    plain = [score for score in scores if score in posthoc.USABLE]
    return own if own in plain or not plain else plain[0]


def _in_order(proposed: Mapping[str, Any]) -> dict[str, Any]:
    """Values as tables print them, the two margins exchanged where they came in the wrong order."""
    values = {k: rounded(v) if isinstance(v, float) else v for k, v in proposed.items()}
    m_in, m_out = values.get("m_in"), values.get("m_out")
    if m_in is not None and m_out is not None and m_in > m_out:
        return {**values, "m_in": m_out, "m_out": m_in}
    return values


def _scheduler(search: Search, metric: str, mode: str) -> Any:
    if search.scheduler == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            max_t=max(search.max_epochs, search.grace_epochs + 1),
            grace_period=search.grace_epochs,
            reduction_factor=3,
        )
    if search.scheduler == "median":
        return MedianStoppingRule(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            grace_period=search.grace_epochs,
            min_samples_required=2,
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]


def _optuna(search: Search) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    several = len(search.objectives) > 1
    modes = [_MODES[name] for name in search.objectives]
    return OptunaSearch(
        metric=list(search.objectives) if several else search.objectives[0],
        mode=modes if several else modes[0],
        seed=search.seed,
    )


def _domains(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space as Ray Tune's domains."""
    makers: Mapping[str, Callable[[Sequence[Any]], Any]] = {
        "choice": lambda given: ray.tune.choice(list(given)),
        "uniform": lambda given: ray.tune.uniform(*given),
        "loguniform": lambda given: ray.tune.loguniform(*given),
        "int": lambda given: ray.tune.randint(given[0], given[1] + 1),
        "logint": lambda given: ray.tune.lograndint(given[0], given[1] + 1),
    }
    assert makers.keys() == SAMPLERS.keys()
    listed = {k: {"choice": d} if isinstance(d, list) else d for k, d in space.items()}
    return {key: makers[name](given) for key, d in listed.items() for name, given in d.items()}


def fit(
    trainable: Any,
    param_space: Mapping[str, Any],
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
    **tuning: Any,
) -> Any:
    """One Tuner run on workers that are used again; nothing of its state is kept."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    for name in ("ray.tune", "ray.tune.search.optuna"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    resources = {"cpu": compute.trial_cpus, "gpu": compute.trial_gpus}
    with tempfile.TemporaryDirectory(prefix="energy-ood-sweep-") as folder:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trainable, resources),
            param_space=dict(param_space),
            tune_config=ray.tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=compute.at_once,
                time_budget_s=budget.left,
                **tuning,
            ),
            run_config=ray.tune.RunConfig(
                name="sweep", storage_path=folder, verbose=0, callbacks=[_Watch(live)]
            ),
        )
        return tuner.fit()


def _why(error: Any) -> str:
    """One line on why a worker did not finish its trial."""
    inner: Any = error
    while inner is not None:
        if isinstance(inner, UserError):
            return str(inner)
        found = getattr(inner, "cause", None) or getattr(inner, "__cause__", None)
        if found is None:
            break
        inner = found
    text = " ".join(str(inner).split())
    if "died" in text or "killed" in text.lower():
        return "the worker was killed (out of memory, or the machine went away)"
    return f"{type(inner).__name__}: {text[:300]}"
