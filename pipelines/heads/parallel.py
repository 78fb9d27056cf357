"""Several workers, one gradient: what is exchanged so that W workers equal one.

Every worker computes the loss of the whole batch, from rows (or classes) that it computed itself
and others that it received. A received row carries no gradient here: its owner has it. Adding the
workers' gradients then gives exactly the gradient of one worker, also for losses that are no
mean over rows. A tensor that every worker computes whole (text features in data-parallel
training) has its gradient divided by the number of workers, or it would count W times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This worker's place among all; one worker exchanges nothing.

    Attributes:
        rank: 0 .. world - 1.
        world: number of workers.
        split: what is divided among them, the rows of a batch or the classes of the prompts.
    """

    rank: int = 0
    world: int = 1
    split: Literal["rows", "classes"] = "rows"

    def part(self, count: int) -> slice:
        """This worker's part of `count` things in order; parts differ by at most one."""
        bounds = [count * part // self.world for part in range(self.world + 1)]
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All workers' parts (n, ...) in order of rank, as (count, ...)."""
        if self.world == 1:
            return part
        gathered: Tensor = _Gather.apply(part, self, count)
        return gathered

    def shared(self, tensor: Tensor) -> Tensor:
        """A tensor that every worker computed whole: 1 / W of its gradient each."""
        if self.world == 1:
            return tensor
        scaled: Tensor = _ScaleGradient.apply(tensor, 1 / self.world)
        return scaled

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the sum over workers."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def total(self, values: Tensor) -> Tensor:
        """The sum over workers of figures for a report."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, workers: Workers, count: int) -> Tensor:
        ctx.part = workers.part(count)
        sizes = [
            len(range(count)[Workers(r, workers.world).part(count)]) for r in range(workers.world)
        ]
        # Equal sizes for the collective: parts are padded to the longest.
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.part], None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
