"""Several settings of one method trained as one batched model.

With image features cached, a step is the text tower over K prompts; for a few classes most of
that is the cost of starting each operation. S settings whose prompts have the same shape are S
prefixes of one pass (`encode_shared`), so a step costs little more for sixteen settings than for
one. Losses, optimisers, learning rates and the choice of the epoch stay each setting's own, and a
setting whose loss is no number leaves the others as they are.

Each setting sees the batches that it would see alone. Products over stacked prefixes round
differently, so a head is that of `train_in_process` but for the last bits; the sweep uses this to
choose, and the chosen setting is trained alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipelines.config import UserError, digest, plain
from pipelines.finetune.data import Trained, TrainingData, TrainingJob, check
from pipelines.finetune.state import (
    Totals,
    TrainingRun,
    add_up,
    batches_of,
    close_epoch,
    finish,
    judge,
    losses_of,
    rate_of,
    start,
    update,
)
from pipelines.heads import HEADS
from pipelines.heads.models import Backbone
from pipelines.heads.parallel import Workers
from pipelines.methods import MethodConfig
from pipelines.methods.optimization import deterministic

# Of a method's `training`, what settings trained together have in common; all else is their own.
SHARED = ("epochs", "batch_size", "outlier_batch_size", "accumulate", "precision", "threads")


def shape_of(method: MethodConfig) -> str | None:
    """Settings with equal shapes can be trained together; None: this one only alone."""
    training = plain(method.training)
    alone = training["accumulate"] > 1 or training["precision"] != "fp32"
    alone = alone or method.num_stages > 1 or method.inner_steps > 0
    if alone or not HEADS[method.head.name].encodes_together(method.head):
        return None
    common = {name: training[name] for name in SHARED}
    return digest([method.name, plain(method.head), common])


def train_together(
    jobs: Sequence[TrainingJob], data: TrainingData, network: Backbone
) -> list[Trained | UserError]:
    """Train one head for each job; one that fails gives its error instead.

    Args:
        jobs: of one shape (`shape_of`) and one seed.
        data: features and labels.
        network: the loaded backbone.

    Raises:
        UserError: for data that cannot train the method.
    """
    check(jobs[0], data)
    method = jobs[0].method
    encode = HEADS[method.head.name].encode_together
    assert encode is not None  # `shape_of` gave them a shape
    failed: dict[int, UserError] = {}
    with deterministic(method.training.threads):
        runs = [start(job, data, network, Workers()) for job in jobs]
        going = list(range(len(runs)))
        for epoch in range(1, method.training.epochs + 1):
            failed |= _train_epoch([runs[n] for n in going], going, epoch, encode)
            going = [n for n in going if n not in failed]
            if not going:
                break
            with torch.no_grad(), _given([runs[n] for n in going], encode):
                for n in going:
                    judge(runs[n], epoch)
        return [failed[n] if n in failed else finish(run) for n, run in enumerate(runs)]


def _train_epoch(
    runs: Sequence[TrainingRun], numbers: Sequence[int], epoch: int, encode: Any
) -> dict[int, UserError]:
    """One pass of every run over the training images; the errors of those that fail."""
    failed: dict[int, UserError] = {}
    totals: dict[int, Totals] = {n: {} for n in numbers}
    batches = [list(batches_of(run)) for run in runs]
    for step in range(len(batches[0])):
        going = [i for i, n in enumerate(numbers) if n not in failed]
        if not going:
            break
        losses = []
        with _given([runs[i] for i in going], encode):
            for i in going:
                rows, outlier_rows = batches[i][step]
                try:
                    loss, figures = losses_of(runs[i], rows, outlier_rows)
                except UserError as error:
                    failed[numbers[i]] = error
                else:
                    losses.append((i, loss))
                    add_up(totals[numbers[i]], figures, len(rows))
        _update_all([(runs[i], loss) for i, loss in losses], epoch, step, len(batches[0]))
    for run, n in zip(runs, numbers, strict=True):
        if n not in failed:
            try:
                rate = rate_of(run, epoch, len(batches[0]) - 1, len(batches[0]))
                close_epoch(run, epoch, rate, totals[n])
            except UserError as error:
                failed[n] = error
    return failed


def _update_all(
    losses: Sequence[tuple[TrainingRun, Tensor]], epoch: int, step: int, steps: int
) -> None:
    """One backward pass for all; no loss depends on another run's parameters."""
    if not losses:
        return
    for run, _ in losses:
        assert run.optimizer is not None
        run.optimizer.zero_grad(set_to_none=True)
    torch.stack([loss for _, loss in losses]).sum().backward()  # type: ignore[no-untyped-call]
    for run, _ in losses:
        update(run, rate_of(run, epoch, step, steps))


@contextmanager
def _given(runs: Sequence[TrainingRun], encode: Any) -> Iterator[None]:
    """For the block, heads whose text features come from one pass for all of them."""
    heads = [run.head for run in runs]
    for head, text in zip(heads, encode(heads), strict=True):
        head.given = text
    try:
        yield
    finally:
        for head in heads:
            head.given = None
