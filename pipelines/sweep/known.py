"""Running settings that are known beforehand, a grid's or a random search's, to their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray
import ray.tune

from pipelines.compute.cluster import ComputeConfig
from pipelines.finetune.together import shape_of
from pipelines.sweep import tune
from pipelines.sweep.progress import Budget, Live
from pipelines.sweep.spec import Spec
from pipelines.sweep.trial_record import has_record
from pipelines.sweep.worker import Trials, known_trials, run

# Settings trained as one batched model; more gain little and are lost together.
MOST_TOGETHER = 16


def run_known(
    specs: Sequence[Spec], shared: Trials, *, compute: ComputeConfig, budget: Budget, live: Live
) -> dict[str, str]:
    """Run trials to their end; returns why, by address, a trial has no record.

    Settings that can be are trained together. What a dead worker left is tried once more, each
    setting alone.
    """
    reasons: dict[str, str] = {}
    waiting = [s for s in specs if s.problem is not None or shared.needs_worker(s.config)]
    for spec in specs:
        if spec not in waiting and not budget.is_spent:
            seen = run(spec, shared).by(spec.criterion)
            live.add(spec.method, None if seen is None else seen.auroc)
    groups = _groups(waiting, compute) if waiting else []
    for _ in range(2):
        if not waiting or budget.is_spent:
            break
        errors = _run_groups(groups, shared, compute, budget, live)
        waiting = [s for s in waiting if not has_record(shared.storage, s.address)]
        waiting = [s for s in waiting if s.address in errors]
        reasons = {spec.address: errors[spec.address] for spec in waiting}
        groups = [[spec] for spec in waiting]
    live.failed += len(waiting)
    for spec in specs:
        if not has_record(shared.storage, spec.address):
            reasons.setdefault(spec.address, tune.TIME_IS_UP)
    return reasons


def _run_groups(
    groups: Sequence[Sequence[Spec]],
    shared: Trials,
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
) -> dict[str, str]:
    """Run each group in one worker; returns why, by address, one did not finish."""
    results = tune.fit(
        ray.tune.with_parameters(known_trials, shared=shared),
        {"specs": ray.tune.grid_search(groups)},
        compute=compute,
        budget=budget,
        live=live,
    )
    return {
        spec.address: tune.why(result.error)
        for result in results
        if result.error is not None
        for spec in result.config["specs"]
    }


def _groups(specs: Sequence[Spec], compute: ComputeConfig) -> list[list[Spec]]:
    """What one worker does at a time: settings of one shape together, others alone.

    No group is so large that a worker would have nothing to do meanwhile.
    """
    shapes: dict[str, list[Spec]] = {}
    for spec in specs:
        shape = None if spec.problem is not None else shape_of(spec.config)
        shapes.setdefault(shape or spec.address, []).append(spec)
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = compute.at_once or int(resources.get("CPU", 1))
    groups = []
    for same in shapes.values():
        size = min(MOST_TOGETHER, -(-len(same) // workers))
        groups += [same[start : start + size] for start in range(0, len(same), size)]
    return groups
