"""One trial of a network: train it with one setting, then judge it as a classifier of its own.

The training is that of the stage `train`, by the same address in the same cache, so the network of
seed 0 of the setting that is chosen is there already. It is judged by its activations of validation
images and of what stands for the unknown, read from the decoded images that it is trained on. What
judges stands in the trial's address; what trains stands in the network's, which is part of it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.backbones import network as backbones
from pipelines.backbones.trainable import TrainableNetwork
from pipelines.code_digest import ROOT, Code, code_of
from pipelines.config import digest
from pipelines.data.feature_sets import FeatureSet
from pipelines.data.storage import Storage
from pipelines.finetune.data import Trained
from pipelines.heads import HEADS, Predictor
from pipelines.heads.base import to_numpy
from pipelines.methods import MethodConfig
from pipelines.methods.optimization import deterministic
from pipelines.score.code import score_rows_used
from pipelines.score.config import PostHocConfig
from pipelines.sweep import trial as sweep_trial
from pipelines.sweep.result import Detection, JudgedOn
from pipelines.sweep.spec import MakeSpec
from pipelines.sweep.trial import Judging, OnEpoch
from pipelines.sweep.trial_record import TrialRecord
from pipelines.train import cache
from pipelines.train.data import Images, NetworkData, NetworkJob
from pipelines.train.loop import features_of
from pipelines.train.stage import train_here

HEAD = "classifier"


@dataclass(frozen=True)
class Labelled:
    """Images and their classes (N,); those of the unknown are -1."""

    images: Images
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class NetworkShared:
    """What every trial of networks works on; put once into Ray's object store.

    Attributes:
        jobs: by method, the training of seed 0 with the method as it is configured.
        data: what networks are trained on.
        validation: ID images.
        ood: what stands for the unknown, by name; empty where classes are held out in turn.
        judged_on: where `ood` comes from.
        storage: where networks and records are kept.
        scores: names, all of them of logits.
        posthoc: what is searched of every score.
        device: where a trial trains and judges.
    """

    jobs: Mapping[str, NetworkJob]
    data: NetworkData
    validation: Labelled
    ood: Mapping[str, Labelled]
    judged_on: JudgedOn
    storage: Storage
    scores: tuple[str, ...]
    posthoc: PostHocConfig
    device: str = "cpu"

    def trial(
        self, name: str, method: MethodConfig, on_epoch: OnEpoch | None = None
    ) -> TrialRecord:
        """Train and judge one setting of the method of that name."""
        return trial(method, self.jobs[name], self, on_epoch)

    def needs_worker(self, method: MethodConfig) -> bool:  # noqa: ARG002
        """Always: a whole network is trained."""
        return True


@dataclass(frozen=True)
class MakeNetworkSpec(MakeSpec):
    """Turns values into the specification of a network's trial.

    Attributes:
        job: the training of seed 0 with the method as it is configured.
        data: what it is trained on.
    """

    job: NetworkJob
    data: NetworkData

    def _address(self, config: MethodConfig) -> str:
        network = cache.address(replace(self.job, method=config), self.data).address
        code = judging_code(self.scores).digest
        return digest([network, config.adjust_logits, code, self.inputs])


def judging_code(scores: tuple[str, ...], *, root: Path = ROOT) -> Code:
    """The code that decides what a trained network's record says.

    Args:
        scores: names of those that are judged.
        root: the folder that holds the project's packages.
    """
    return code_of(
        judge,
        sweep_trial.attempt,
        HEADS[HEAD].Config.__module__,
        *score_rows_used(scores),
        root=root,
    )


def trial(
    method: MethodConfig, job: NetworkJob, shared: NetworkShared, on_epoch: OnEpoch | None = None
) -> TrialRecord:
    """Train one network, unless it is there, and search every score's parameters on its logits.

    Args:
        method: the setting.
        job: the training as it is without that setting.
        shared: what it works on.
        on_epoch: called after each epoch that is trained with its number and what judges the
            network as it is then.
    """
    start = time.perf_counter()
    job = replace(job, method=method)
    address = train_here(
        job,
        shared.data,
        shared.storage,
        device=shared.device,
        on_network=None if on_epoch is None else functools.partial(_tell, on_epoch, job, shared),
    )
    trained = cache.trained_backbone(job.backbone, address, shared.storage, method.name)
    network = backbones.trainable(trained, shared.data.class_names, "backbone", 0)
    seconds = time.perf_counter() - start
    with deterministic(method.training.threads):
        return judge(network.to(shared.device), method, shared, seconds=seconds)


def _tell(
    on_epoch: OnEpoch,
    job: NetworkJob,
    shared: NetworkShared,
    epoch: int,
    network: TrainableNetwork,
) -> None:
    def follow(score: str) -> tuple[float, Detection]:
        head = _head(network, job.method, shared.data)
        return sweep_trial.followed(head, score, _judging(network, shared))

    on_epoch(epoch, follow)


def judge(
    network: TrainableNetwork, method: MethodConfig, shared: NetworkShared, *, seconds: float
) -> TrialRecord:
    """The record of a trained network: its accuracy, and the best of every score's settings.

    Args:
        network: on its device.
        method: its setting.
        shared: what it is judged on.
        seconds: that its training took.
    """
    head = _head(network, method, shared.data)
    trained = Trained(head, head, method.training.epochs, ())
    return sweep_trial.judged(trained, method, _judging(network, shared), seconds=seconds)


def _head(network: TrainableNetwork, method: MethodConfig, data: NetworkData) -> Predictor:
    """The network's own last layer."""
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    return Predictor(
        HEAD,
        {"weight": to_numpy(network.linear.weight), "bias": to_numpy(network.linear.bias)},
        {},
        1.0,
        data.class_names,
        class_prior=tuple((counts / counts.sum()).tolist()) if method.adjust_logits else (),
        adjustment=method.adjust_logits,
    )


def _judging(network: TrainableNetwork, shared: NetworkShared) -> Judging:
    """The sets as the network's activations."""
    every = {"validation": shared.validation, **shared.ood}
    validation, *ood = (
        FeatureSet(
            name,
            tuple(map(str, of.images.ids)),
            to_numpy(features_of(network, of.images)),
            of.labels,
        )
        for name, of in every.items()
    )
    return Judging(
        validation=validation,
        ood=dict(zip(shared.ood, ood, strict=True)),
        storage=shared.storage,
        scores=shared.scores,
        posthoc=shared.posthoc,
    )
