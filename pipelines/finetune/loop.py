"""The training loop: pure torch, the same in this process and on every Ray Train worker.

One `TrainingJob` (a method's resolved setting and a seed) and one `TrainingData` give one trained
head. The loop knows no method: it sums the losses that the method returns by name. It is
deterministic: on one machine the same job and data give the same bytes, also when it was
interrupted after any epoch and went on from its checkpoint.

Rule for the epoch that is kept: the highest validation accuracy; among equals the lowest
validation cross-entropy; among equals the earlier epoch. Without validation images: the last.
A method's own losses never choose. A method that trains in stages has this rule for the first;
the next one begins at the epoch it kept. Later stages need not move what validation sees, so that
of equals their later epoch is kept.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pipelines.finetune.data import (
    Checkpoint,
    EpochReport,
    Trained,
    TrainingData,
    TrainingJob,
    check,
)
from pipelines.finetune.state import (
    Totals,
    TrainingRun,
    add_up,
    batches_of,
    close_epoch,
    enter_stage,
    finish,
    judge,
    losses_of,
    predictor_of,
    rate_of,
    start,
    update,
)
from pipelines.heads import Predictor
from pipelines.heads.models import Backbone
from pipelines.heads.parallel import Workers
from pipelines.methods.optimization import deterministic

__all__ = [
    "Checkpoint",
    "EpochReport",
    "OnHead",
    "Trained",
    "TrainingData",
    "TrainingJob",
    "check",
    "train_in_process",
]

OnEpoch: TypeAlias = Callable[[EpochReport], None]
OnHead: TypeAlias = Callable[[int, Predictor], None]


def train_in_process(
    job: TrainingJob,
    data: TrainingData,
    network: Backbone,
    *,
    workers: Workers | None = None,
    checkpoint: Checkpoint | None = None,
    on_epoch: OnEpoch | None = None,
    on_head: OnHead | None = None,
) -> Trained:
    """Train one head.

    Args:
        job: what to train and the seed.
        data: features and labels; `check` has accepted them.
        network: the loaded backbone; its text tower is read, never changed.
        workers: this worker's place, where several train together.
        checkpoint: where to keep the state after each epoch, and to go on from.
        on_epoch: called with each epoch's report.
        on_head: called with each epoch's number and the head as it is then.

    Raises:
        UserError: where the loss stops being a number.
    """
    check(job, data)
    with deterministic(job.method.training.threads):
        run = start(job, data, network, workers or Workers())
        if job.method.head.trainable:
            _resume(run, checkpoint)
            for epoch in range(len(run.history) + 1, job.method.num_epochs + 1):
                enter_stage(run, epoch)
                _train_epoch(run, epoch)
                judge(run, epoch)
                if checkpoint is not None:
                    checkpoint.save(_pack(run))
                if on_epoch is not None:
                    on_epoch(run.history[-1])
                if on_head is not None:
                    on_head(epoch, predictor_of(run))
        else:
            judge(run, 0)
        return finish(run)


def _train_epoch(run: TrainingRun, epoch: int) -> None:
    """One pass over the training images; its mean losses begin the epoch's report."""
    batches = list(batches_of(run))
    totals: Totals = {}
    for number, (rows, outlier_rows) in enumerate(batches):
        rate = rate_of(run, epoch, number, len(batches))
        add_up(totals, _step(run, rows, outlier_rows, rate), len(rows))
    close_epoch(run, epoch, rate, totals)


def _step(
    run: TrainingRun, rows: Tensor, outlier_rows: Tensor | None, rate: float
) -> dict[str, float]:
    """The updates by a batch; returns the last one's losses and the method's report, by name."""
    for _ in range(run.method.inner_steps):
        _update(run, rows, outlier_rows, rate, inner=True)
    return _update(run, rows, outlier_rows, rate)


def _update(
    run: TrainingRun,
    rows: Tensor,
    outlier_rows: Tensor | None,
    rate: float,
    *,
    inner: bool = False,
) -> dict[str, float]:
    """One update, an inner or the method's own."""
    assert run.optimizer is not None
    run.optimizer.zero_grad(set_to_none=True)
    report: Totals = {}
    parts = rows.tensor_split(min(run.method.training.accumulate, len(rows)))
    outlier_parts = outlier_rows.tensor_split(len(parts)) if outlier_rows is not None else ()
    for number, part in enumerate(parts):
        share = len(part) / len(rows)
        outlier_part = outlier_parts[number] if outlier_parts else None
        total, figures = losses_of(run, part, outlier_part, inner=inner)
        (total * share).backward()  # type: ignore[no-untyped-call]
        add_up(report, figures, share)
    run.workers.add_gradients(p for p in run.parameters.values() if p.requires_grad)
    update(run, rate)
    return report


def _pack(run: TrainingRun) -> bytes:
    """The state after an epoch: weights, optimiser, random state, history, best epoch."""
    assert run.optimizer is not None
    device = run.context.features.device
    state = {
        "parameters": {name: p.detach() for name, p in run.parameters.items()},
        "optimizer": run.optimizer.state_dict(),
        "order": run.order.get_state(),
        "outlier_order": run.outlier_order.get_state(),
        "random": torch.get_rng_state(),
        "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "history": run.history,
        "best_epoch": run.best_epoch,
        "best": run.best,
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _resume(run: TrainingRun, checkpoint: Checkpoint | None) -> None:
    """Put the run where its last finished epoch left it."""
    content = checkpoint.load() if checkpoint is not None else None
    if content is None:
        return
    assert run.optimizer is not None
    device = run.context.features.device
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(state["parameters"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    run.order.set_state(state["order"])
    run.outlier_order.set_state(state["outlier_order"])
    torch.set_rng_state(state["random"])
    if state["device_random"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device_random"], device)
    run.history = state["history"]
    run.best_epoch = state["best_epoch"]
    run.best = {name: value.to(device) for name, value in state["best"].items()}
