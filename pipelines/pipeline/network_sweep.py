"""What a search of networks' settings is handed, and how its choices join those of the sweep."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.run import Run
from pipelines.run.space import judged
from pipelines.settings.config import searched_networks
from pipelines.sweep import networks as sweep_networks
from pipelines.sweep.networks import NetworkInputs
from pipelines.sweep.result import Choice, SweepResult
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.image_table import ImageTable


def search(
    run: Run,
    jobs: Mapping[str, NetworkJob],
    data: NetworkData,
    tables: Mapping[str, ImageTable],
    before: SweepResult | None,
) -> SweepResult | None:
    """The choices for those of the methods that have a search space, added to those `before`.

    Args:
        run: whose sweep it is.
        jobs: by method, the training of the first seed with the method as it is configured.
        data: what networks are trained on.
        tables: the decoded images by source.
        before: what was chosen of other methods of the run.
    """
    names = searched_networks(run.config)
    searched = {name: job for name, job in jobs.items() if name in names}
    if not searched:
        return before
    found = sweep_networks.run(
        NetworkInputs(
            jobs=searched,
            scores=run.config.scores,
            data=data,
            benchmark=run.benchmark,
            tables=tables,
            learns=any(method.needs_outliers for method in run.config.methods.values()),
            storage=run.storage,
        ),
        run.config.sweep,
        compute=run.config.compute,
        on_progress=run.observer.progress,
    )
    if before is None:
        return found
    both = {**before.methods, **found.methods}
    return found.model_copy(update={"methods": both, "trials": before.trials + found.trials})


def joined(
    run: Run, result: SweepResult, table: pa.Table | None
) -> tuple[SweepResult, pa.Table | None]:
    """The sweep's result with the settings of networks, and the trials that chose them.

    The scores' parameters are those that the sweep chose on the networks' own features.

    Args:
        run: whose stage train is done.
        result: of the sweep, in which a network is judged as it is.
        table: the surfaces of the chosen trials, or None.
    """
    searched = run.trained.swept
    chosen = {} if searched is None else searched.methods
    methods = {n: _joined(run, n, c, chosen.get(n)) for n, c in result.methods.items()}
    trials = [
        trial
        for name in methods
        for trial in (searched if searched is not None and name in chosen else result).of(name)
    ]
    for name, choice in chosen.items() if table is not None else ():
        table = _numbered(table, name, choice.trial)
    return result.model_copy(update={"methods": methods, "trials": tuple(trials)}), table


def choices(run: Run) -> dict[str, Choice]:
    """What was chosen of each method, by name, with the setting as its result is judged."""
    return {
        name: choice.model_copy(update={"setting": judged(choice.setting)})
        for name, choice in run.swept.methods.items()
    }


def _joined(run: Run, name: str, choice: Choice, of_network: Choice | None) -> Choice:
    if name in run.frozen:  # a head's setting is the sweep's own choice
        return choice
    update: dict[str, object] = {"setting": run.settings[name]}
    if of_network is not None:
        update |= {"chosen": of_network.chosen, "trial": of_network.trial}
    return choice.model_copy(update=update)


def _numbered(table: pa.Table, method: str, trial: int | None) -> pa.Table:
    """A method's rows under the number of the trial whose network they are of."""
    place = table.schema.get_field_index("trial")
    is_its = pc.equal(table["method"], method)
    numbers = pc.if_else(is_its, pa.scalar(trial, pa.int64()), table["trial"])
    return table.set_column(place, table.schema.field(place), numbers)
