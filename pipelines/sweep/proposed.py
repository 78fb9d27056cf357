"""Running settings that Optuna proposes from what came out, or that a scheduler stops early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.sweep import tune
from pipelines.sweep.config import Objective, Scheduler
from pipelines.sweep.domains import SAMPLERS, Space
from pipelines.sweep.progress import Budget, Live
from pipelines.sweep.result import ScoreFigures, Settings
from pipelines.sweep.space import in_order
from pipelines.sweep.spec import MakeSpec, Spec
from pipelines.sweep.trial_record import TrialRecord, failed, has_record, read_record
from pipelines.sweep.worker import Trials, live_trial

_MODES: Mapping[Objective, str] = {"accuracy": "max", "auroc": "max", "fpr": "min"}


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
    settings: Sequence[Settings]
    space: Space
    num_samples: int
    scheduler: Scheduler
    objectives: tuple[Objective, ...]
    grace_epochs: int
    max_epochs: int
    seed: int


def run_proposed(
    search: Search,
    make_spec: MakeSpec,
    shared: Trials,
    *,
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
) -> list[tuple[Spec, TrialRecord]]:
    """Run one method's trials under a scheduler or Optuna; every trial with its record.

    A trial that was stopped early has the figures of its last epoch.
    """
    known = list(search.settings)
    values: Any = ray.tune.grid_search(known) if known else _domains(search.space)
    results = tune.fit(
        ray.tune.with_parameters(live_trial, shared=shared, make_spec=make_spec),
        {"values": values},
        compute=compute,
        budget=budget,
        live=live,
        num_samples=1 if known else search.num_samples,
        scheduler=_scheduler(search),
        search_alg=None if known else _optuna(search),
    )
    finished = []
    for result in results:
        spec = make_spec(in_order(result.config["values"]))
        finished.append((spec, _record(result, spec, shared)))
    return finished


def _record(result: Any, spec: Spec, shared: Trials) -> TrialRecord:
    """The record that a worker kept, or what is known of a trial that came to none."""
    if has_record(shared.storage, spec.address):
        return read_record(shared.storage, spec.address)
    if result.error is not None:
        return failed(UserError(tune.why(result.error)))
    reported = result.metrics or {}
    if "auroc" not in reported:
        return failed(UserError(tune.TIME_IS_UP))
    last = ScoreFigures(params={}, auroc=reported["auroc"], fpr=reported["fpr"], tried=0)
    return TrialRecord(
        status="stopped",
        reason=f"stopped after epoch {reported['epoch']}",
        accuracy=reported["accuracy"],
        scores={spec.criterion: last},
        seconds=round(reported.get("time_total_s", 0.0), 3),
    )


def _scheduler(search: Search) -> Any:
    metric = search.objectives[0]
    mode = _MODES[metric]
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


# Ray Tune's domain by the name of a sampler.
_DOMAINS: Mapping[str, Callable[[Sequence[Any]], object]] = {
    "choice": lambda given: ray.tune.choice(list(given)),
    "uniform": lambda given: ray.tune.uniform(*given),
    "loguniform": lambda given: ray.tune.loguniform(*given),
    "int": lambda given: ray.tune.randint(given[0], given[1] + 1),
    "logint": lambda given: ray.tune.lograndint(given[0], given[1] + 1),
}
assert _DOMAINS.keys() == SAMPLERS.keys()


def _domains(space: Space) -> dict[str, object]:
    """A space as Ray Tune's domains."""
    listed = {k: {"choice": d} if isinstance(d, list) else d for k, d in space.items()}
    return {key: _DOMAINS[name](given) for key, d in listed.items() for name, given in d.items()}
