"""Ray Tune as a sweep uses it: workers that are used again, and no state that is kept.

What is finished is a file (`pipelines.sweep.trial_record`), so a sweep that was killed goes on
where it was without Tune's own state. `pipelines.sweep.known` runs settings that are known
beforehand, `pipelines.sweep.proposed` those that are proposed and stopped on the way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.tune

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.store.processes import temporary_folder
from pipelines.sweep.progress import Budget, Live

TIME_IS_UP = "not run: the sweep's time was up"
_KILLED = "the worker was killed (out of memory, or the machine went away)"


@dataclass
class _Watch(ray.tune.Callback):
    """Carries what workers report to the live view; one Tune trial may be several of a sweep's."""

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
        result: Mapping[str, Any],
        **_: Any,
    ) -> None:
        if result.get("finished"):
            self.left[trial.trial_id] -= 1
            self.live.running = sum(self.left.values())
            self.live.add(result["method"], None if result["failed"] else float(result["auroc"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self.live.done += self.left.pop(trial.trial_id, 0)  # stopped early
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
        self.left.pop(trial.trial_id, None)
        self._show()

    def _show(self) -> None:
        self.live.running = sum(self.left.values())
        self.live.show()


def fit(
    trainable: Any,
    param_space: Mapping[str, object],
    *,
    compute: ComputeConfig,
    budget: Budget,
    live: Live,
    **tuning: Any,
) -> Any:
    """Run one Tuner; its results, one for each of Tune's trials.

    Args:
        trainable: what a worker runs.
        param_space: what it is given, a Tune domain under each name.
        compute: resources of a trial, and how many run at once.
        budget: the sweep's time.
        live: is told what workers report.
        **tuning: further fields of Tune's `TuneConfig`.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    for name in ("ray.tune", "ray.tune.search.optuna"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    resources = {"cpu": compute.trial_cpus, "gpu": compute.trial_gpus}
    with temporary_folder() as folder:
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
                name="sweep", storage_path=str(folder), verbose=0, callbacks=[_Watch(live)]
            ),
        )
        return tuner.fit()


def why(error: BaseException) -> str:
    """One line on why a worker did not finish its trial."""
    inner = error
    while not isinstance(inner, UserError):
        # Ray wraps a worker's exception and names it `cause`.
        cause = getattr(inner, "cause", None) or inner.__cause__
        if not isinstance(cause, BaseException):
            break
        inner = cause
    if isinstance(inner, UserError):
        return str(inner)
    text = " ".join(str(inner).split())
    if "died" in text or "killed" in text.lower():
        return _KILLED
    return f"{type(inner).__name__}: {text[:300]}"
