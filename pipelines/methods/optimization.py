"""What every training loop shares: the optimiser, its learning rates, and determinism."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipelines.backbones.threads import torch_threads
from pipelines.methods.base import TrainingConfig


def optimizer(config: TrainingConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of a training, whose learning rate is set at every step."""
    values = list(parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(values, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(values, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        values,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step 0, 1, ...: constant warm-up, then a cosine or drops to a tenth."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr
    # The last step is at final_lr's end of the cosine but not on it: a step at 0 is wasted.
    progress = (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup)
    if config.schedule == "steps":
        return config.lr * 0.1 ** sum(progress >= share for share in config.milestones)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """For the block a fixed number of threads and a random state of its own; both are put back."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch_threads(threads), torch.random.fork_rng(devices=devices):
        yield
