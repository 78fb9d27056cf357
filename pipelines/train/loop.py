"""The training loop of a network: pure torch, the same here and on every Ray Train worker.

One `NetworkJob` (a method's setting and a seed) and one `NetworkData` give the weights of one
network. The loop knows no method: it sums the losses that the method returns by name, as the loop
of heads does (`pipelines.finetune.loop`). Images and outliers pass the network together, as in the
authors' code of Liu 2020 and Choi 2023, so batch normalisation sees both.

Several workers share each batch: every worker computes the loss of the whole batch from the rows
that it encoded itself and the logits of the others, so that losses that are no mean over rows are
those of one worker. Batch normalisation sees a worker's own part of the batch.

The network of the last epoch is kept, as in the recipes of all four papers: validation images only
report. On one machine with one worker the same job and data give the same bytes, also when the
training was stopped at any moment and went on from its checkpoint.
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.backbones.trainable import TrainableNetwork
from pipelines.config import UserError
from pipelines.heads.parallel import Workers
from pipelines.methods import METHODS
from pipelines.methods.base import Batch, Initial, Outputs
from pipelines.methods.optimization import deterministic, learning_rate, optimizer
from pipelines.ood.seeds import stream
from pipelines.train.batches import Reader, Rows, Step, in_order, parts_of, steps_of
from pipelines.train.data import (
    EpochReport,
    Images,
    NetworkData,
    NetworkJob,
    OnEpoch,
    TrainedNetwork,
    check,
)

# Images of a batch where nothing is trained: the pass before training, and validation.
EVALUATED_AT_ONCE = 500
# Seconds between checkpoints within an epoch.
PAUSE = 600.0
# Is given an epoch's number and the network as it is then.
OnNetwork: TypeAlias = Callable[[int, TrainableNetwork], None]


class Checkpoint(Protocol):
    """Where a training keeps its state."""

    def load(self) -> bytes | None:
        """What was saved last, or None."""

    def save(self, content: bytes) -> None:
        """Replace it, whole or not at all."""


@dataclass
class NetworkRun:
    """The state of a training; what changes between steps is in its checkpoint.

    Attributes:
        epoch, step: how many are finished, of the training and of the epoch that is under way.
        totals: figures of that epoch, added up over its images.
    """

    job: NetworkJob
    data: NetworkData
    network: TrainableNetwork
    model: nn.Module  # the network, or what makes it one of several workers
    optimizer: torch.optim.Optimizer
    reader: Reader
    workers: Workers
    average: AveragedModel | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    history: list[EpochReport] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.mean.device

    @property
    def kept(self) -> TrainableNetwork:
        """What is judged and kept: the moving average of the weights, or the weights."""
        if self.average is None:
            return self.network
        network = self.average.module
        assert isinstance(network, TrainableNetwork)
        return network


def train_network(
    job: NetworkJob,
    data: NetworkData,
    network: TrainableNetwork,
    *,
    workers: Workers | None = None,
    checkpoint: Checkpoint | None = None,
    on_epoch: OnEpoch | None = None,
    on_network: OnNetwork | None = None,
) -> TrainedNetwork:
    """Train one network.

    Args:
        job: what to train and the seed.
        data: images and labels; `check` has accepted them.
        network: as it starts (`pipelines.backbones.trainable`), on its device; it is changed.
        workers: this worker's place, where several train together.
        checkpoint: where to keep the state, and to go on from.
        on_epoch: called with each epoch's report.
        on_network: called with each epoch's number and the network that would be kept after it,
            which it may not change.

    Raises:
        UserError: where the loss stops being a number.
    """
    check(job, data)
    if not job.method.needs_outliers:
        data = replace(data, outliers=None)
    with deterministic(job.method.training.threads):
        run = _start(job, data, network, workers or Workers())
        if not _resume(run, checkpoint):
            run.prepared = _prepare(run)
        while run.epoch < job.method.training.epochs:
            _train_epoch(run, checkpoint)
            if checkpoint is not None:
                checkpoint.save(_pack(run))
            if on_epoch is not None:
                on_epoch(run.history[-1])
            if on_network is not None:
                on_network(run.epoch, run.kept)
    return TrainedNetwork(run.kept.state(), tuple(run.history))


def _start(
    job: NetworkJob, data: NetworkData, network: TrainableNetwork, workers: Workers
) -> NetworkRun:
    if job.method.projection_dim:
        network.project(job.method.projection_dim, stream(job.seed, "projection"))
    network.to(memory_format=torch.channels_last)
    how = job.method.network
    assert how is not None  # only such jobs train networks
    if how.parameters == "norm_and_last":
        network.train_norm_and_last()
    model: nn.Module = network
    if workers.world > 1:
        # Only the first worker's statistics of batch normalisation are kept, and none trains.
        model = nn.parallel.DistributedDataParallel(
            network, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    reader = Reader(how.augmentation, job.method.num_views, job.seed)
    average = None
    if how.average:
        # Statistics of batch normalisation are averaged too.
        rule = get_ema_multi_avg_fn(how.average)  # type: ignore[no-untyped-call]
        average = AveragedModel(network, multi_avg_fn=rule, use_buffers=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    updates = optimizer(job.method.training, trained)
    return NetworkRun(job, data, network, model, updates, reader, workers, average)


def _prepare(run: NetworkRun) -> dict[str, Tensor]:
    """What the method measures once, on what the network gives before training."""
    method, data = run.job.method, run.data
    prepare = METHODS[method.name].prepare
    if prepare is None:
        return {}
    counts, wanted = run.job.outlier_counts, method.prepares_from_logits
    outliers = data.outliers if wanted else None
    initial = Initial(
        logits=logits_of(run.network, data.images) if wanted else torch.zeros(0),
        outlier_logits=None if outliers is None else logits_of(run.network, outliers),
        outlier_counts=None if counts is None else torch.tensor(counts),
        labels=torch.from_numpy(data.labels),
    )
    try:
        return {name: v.to(run.device) for name, v in prepare(method, initial).items()}
    except ValueError as error:
        raise UserError(f"method={method.name}: {error}") from None


def features_of(network: TrainableNetwork, images: Images) -> Tensor:
    """Penultimate activations (N, D) of images as they are, float32, on the network's device."""
    return _evaluated(network, images, np.arange(len(images.ids)), 0)


def logits_of(network: TrainableNetwork, images: Images, rows: Rows | None = None) -> Tensor:
    """Logits (N, K) of images as they are, float32, on the network's device.

    Args:
        network: in any mode; it is put back into it.
        images: what is encoded.
        rows: which of them; all where None.
    """
    return _evaluated(network, images, np.arange(len(images.ids)) if rows is None else rows, 1)


@torch.no_grad()
def _evaluated(network: TrainableNetwork, images: Images, rows: Rows, which: int) -> Tensor:
    """One of the network's outputs for these rows, in evaluation mode."""
    training, device = network.training, network.mean.device
    network.eval()
    parts = [
        network(images.read(rows[chosen]).to(device))[which]
        for chosen in in_order(len(rows), EVALUATED_AT_ONCE)
    ]
    network.train(training)
    return torch.cat(parts).float()


def _train_epoch(run: NetworkRun, checkpoint: Checkpoint | None) -> None:
    """The steps of the epoch that are still to be done, and its report."""
    config, epoch = run.job.method.training, run.epoch + 1
    steps = steps_of(
        config,
        len(run.data.labels),
        0 if run.data.outliers is None else len(run.data.outliers.ids),
        seed=run.job.seed,
        epoch=epoch,
    )
    saved = time.monotonic()
    run.model.train()
    for number in range(run.step, len(steps)):
        rate = learning_rate(config, (epoch - 1) * len(steps) + number, len(steps))
        for name, value in _take(run, steps[number], epoch, number, rate).items():
            weight = len(steps[number].rows)
            run.totals[name] = run.totals.get(name, 0.0) + value * weight
        run.step = number + 1
        if checkpoint is not None and time.monotonic() - saved > PAUSE and run.step < len(steps):
            checkpoint.save(_pack(run))
            saved = time.monotonic()
    _close(run, sum(len(step.rows) for step in steps), rate)


def _take(run: NetworkRun, step: Step, epoch: int, number: int, rate: float) -> dict[str, float]:
    """One update; the losses and the method's report, by name.

    Raises:
        UserError: where the loss is no number.
    """
    # Dropout and what losses draw follow from the step, so a training can go on at any.
    torch.manual_seed(stream(run.job.seed, f"step {number} of epoch {epoch}, {run.workers.rank}"))
    run.optimizer.zero_grad(set_to_none=True)
    report: dict[str, float] = {}
    for part in parts_of(step, run.job.method.training.accumulate):
        share = len(part.rows) / len(step.rows)
        total, figures = _losses(run, part, epoch, number)
        # DistributedDataParallel takes the mean of the workers' gradients; their sum is right.
        (total * (share * run.workers.world)).backward()  # type: ignore[no-untyped-call]
        for name, value in figures.items():
            report[name] = report.get(name, 0.0) + value * share
    if not math.isfinite(report["loss"]):
        raise _gone_wrong(run, f"the loss is {report['loss']} at step {number + 1} of", rate)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    if run.average is not None:
        run.average.update_parameters(run.network)
    return report


def _gone_wrong(run: NetworkRun, what: str, rate: float) -> UserError:
    """What a user is told whose training left the range of numbers."""
    return UserError(
        f"method={run.job.method.name}: {what} epoch {run.epoch + 1}, learning rate {rate:.3g}; "
        "try a smaller training.lr, or a longer training.warmup_epochs"
    )


def _losses(
    run: NetworkRun, part: Step, epoch: int, number: int
) -> tuple[Tensor, dict[str, float]]:
    """What is minimised, and the figures of its report."""
    method, data = run.job.method, run.data
    outputs = _outputs(run, part, epoch)
    batch = Batch(
        labels=torch.from_numpy(data.labels[part.rows]).to(run.device),
        prepared=run.prepared,
        seed=stream(run.job.seed, f"losses at step {number} of epoch {epoch}"),
    )
    try:
        losses, extra = METHODS[method.name].loss(outputs, batch, method)
    except ValueError as error:
        # The maths refuses what is no number; for the user that is a training gone wrong.
        raise UserError(
            f"method={method.name}: {error}, in epoch {epoch}; try a smaller training.lr than "
            f"{method.training.lr}"
        ) from None
    total = torch.stack(list(losses.values())).sum()
    figures = {"loss": float(total.detach()), **extra}
    return total, figures | {f"loss/{name}": float(v.detach()) for name, v in losses.items()}


def _outputs(run: NetworkRun, part: Step, epoch: int) -> Outputs:
    """One pass over this worker's images and outliers together, joined with the others'."""
    own = part.rows[run.workers.part(len(part.rows))]
    pixels, views = [run.reader.read(run.data.images, own, epoch)], run.reader.num_views
    outliers = part.outlier_rows
    if outliers is not None and run.data.outliers is not None:
        some = outliers[run.workers.part(len(outliers))]
        pixels.append(replace(run.reader, num_views=1).read(run.data.outliers, some, epoch))
    half = run.job.method.training.precision == "bf16"
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=half):
        given = run.model(torch.cat(pixels).to(run.device, non_blocking=True))
    n, count = views * len(own), len(part.rows)
    # One exchange of all that the network gives: each one makes the workers wait for each other.
    joined, widths = torch.cat([x.float() for x in given], dim=1), [x.shape[1] for x in given]
    # Views lie one after the other: (V n, ...) to (n, V, ...), then the other workers' rows.
    rows = joined[:n].reshape(views, len(own), -1).transpose(0, 1)
    images = torch.split(run.workers.gather(rows, count), widths, dim=2)
    others: Sequence[Tensor | None] = [None] * len(widths)
    if outliers is not None:
        others = torch.split(run.workers.gather(joined[n:], len(outliers)), widths, dim=1)
    features, logits = images[:2]
    return Outputs(
        similarity=logits[:, 0],
        logits=logits[:, 0],
        image_features=features[:, 0],
        text_features=None,
        outlier_similarity=None,
        outlier_logits=others[1],
        logit_scale=1.0,
        view_logits=logits if views > 1 else None,
        projections=images[2] if len(images) > 2 else None,
        outlier_projections=others[2] if len(others) > 2 else None,
    )


def _close(run: NetworkRun, count: int, rate: float) -> None:
    """End the epoch: the means of its figures, and what validation says.

    Raises:
        UserError: where a weight or a figure is no number.
    """
    report = {"epoch": float(run.epoch + 1), "lr": rate}
    report |= {name: total / count for name, total in run.totals.items()}
    labels = torch.from_numpy(run.data.validation_labels).to(run.device)
    if len(labels):
        logits = logits_of(run.kept, run.data.validation)
        report["validation/accuracy"] = float((logits.argmax(dim=1) == labels).float().mean())
        report["validation/cross_entropy"] = float(F.cross_entropy(logits, labels))
    # The last update of an epoch has no loss after it that would show what it did.
    weights = itertools.chain(run.kept.parameters(), run.kept.buffers())
    if not all(bool(value.isfinite().all()) for value in weights):
        raise _gone_wrong(run, "a weight is no number after", rate)
    if wrong := [name for name, value in report.items() if not math.isfinite(value)]:
        raise _gone_wrong(run, f"{wrong[0]} is no number in", rate)
    run.history.append(report)
    run.epoch, run.step, run.totals = run.epoch + 1, 0, {}


def _pack(run: NetworkRun) -> bytes:
    """The state: weights, optimiser, what was prepared, how far the training is."""
    state = {
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "prepared": dict(run.prepared),
        "epoch": run.epoch,
        "step": run.step,
        "totals": run.totals,
        "history": run.history,
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _resume(run: NetworkRun, checkpoint: Checkpoint | None) -> bool:
    """Put the run where its checkpoint left it; whether there was one."""
    content = checkpoint.load() if checkpoint is not None else None
    if content is None:
        return False
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    run.network.load_state_dict(state["network"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    run.prepared = {name: value.to(run.device) for name, value in state["prepared"].items()}
    run.epoch, run.step = state["epoch"], state["step"]
    run.totals, run.history = state["totals"], state["history"]
    return True
