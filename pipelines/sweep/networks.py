"""Choosing the training settings of whole networks, before any of them is embedded.

A trial trains the network of the first seed (`pipelines.sweep.network_trial`) and is judged by the
run's scores of logits alone: what is fitted to features is searched afterwards, on the features of
the network that was chosen. How settings are proposed, stopped and chosen is the sweep's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError, digest, plain
from pipelines.data.benchmarks import Benchmark
from pipelines.data.storage import Storage
from pipelines.score import search as posthoc
from pipelines.sweep import choice
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.network_trial import HEAD, Labelled, MakeNetworkSpec, NetworkShared
from pipelines.sweep.progress import Progress
from pipelines.sweep.result import SweepResult
from pipelines.sweep.stage import run_trials, unknown
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.image_set import address_of_sets, images_of
from pipelines.train.image_table import ImageTable

VALIDATION = "validation"


@dataclass(frozen=True)
class NetworkInputs:
    """What a search of networks chooses the settings of, and what it works on.

    Attributes:
        jobs: by method, the training of the first seed with the method as it is configured.
        scores: the run's, by name.
        data: what networks are trained on.
        benchmark: its sets; only ID validation and what stands for the unknown are read.
        tables: the decoded images by source.
        learns: whether a method of the run learns from outliers.
        storage: where networks and finished trials are kept.
    """

    jobs: Mapping[str, NetworkJob]
    scores: Sequence[str]
    data: NetworkData
    benchmark: Benchmark
    tables: Mapping[str, ImageTable]
    learns: bool
    storage: Storage


def run(
    inputs: NetworkInputs,
    settings: SweepConfig,
    *,
    compute: ComputeConfig,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Choose the setting of every method.

    Args:
        inputs: the trainings, and what they are judged on.
        settings: the search space.
        compute: resources of a trial.
        on_progress: called with (trials done, in all, a note).

    Raises:
        UserError: for a benchmark without validation data, a space that does not fit, or a
            method all of whose trials failed.
    """
    judged_on, names = unknown(inputs.benchmark, learns=inputs.learns)
    shared = NetworkShared(
        jobs=inputs.jobs,
        data=inputs.data,
        validation=_labelled(inputs, VALIDATION),
        ood={name: _labelled(inputs, name) for name in names},
        judged_on=judged_on,
        storage=inputs.storage,
        scores=tuple(posthoc.usable(inputs.scores, HEAD)),
        posthoc=settings.posthoc,
        device="cuda" if compute.trial_gpus else "cpu",
    )
    pixels = address_of_sets(inputs.benchmark, [VALIDATION, *names], inputs.tables)
    judged = digest([judged_on, pixels, plain(settings.posthoc), list(shared.scores)])
    makers = {
        name: MakeNetworkSpec(name, job.method, shared.scores, judged, job, inputs.data)
        for name, job in inputs.jobs.items()
    }
    finished = run_trials(makers, shared, settings, compute=compute, on_progress=on_progress)
    choices = {
        name: choice.choice_of(choice.choose(trials, settings.accuracy_tolerance))
        for name, trials in finished.items()
    }
    return choice.result_of(finished, choices, settings, judged_on)


def _labelled(inputs: NetworkInputs, name: str) -> Labelled:
    images, labels = images_of(inputs.benchmark, name, inputs.tables)
    if not len(labels):
        count = len(inputs.benchmark.sets[name])
        raise UserError(f"set {name!r}: none of its {count} images could be read")
    return Labelled(images, labels)
