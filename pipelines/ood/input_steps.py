"""Scores of images that took a step towards the known images first (Liang 2018, Lee 2018).

ODIN and the perturbed Mahalanobis score both take one step x + eps * sign(grad_x S(h(x))) up a
score S of the features h(x), and judge the image after it: a known image gains more by the step
than an unknown one. Each of them is a fitted record S with a gradient (`DifferentiableScore`). The
caller that has the pixels takes the step (`step_up`) and scores the features of its result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from pipelines.ood.checks import Array, as_tensor, check_positive, map_rows
from pipelines.ood.linear_layer import LinearLayer
from pipelines.ood.scores import max_softmax


class DifferentiableScore(Protocol):
    """A fitted record whose score has a gradient."""

    def __call__(self, features: Array, /) -> Tensor:
        """Scores float64 (N,) of features (N, D), HIGH for in-distribution."""

    def differentiable(self, rows: Tensor) -> Tensor:
        """(B,) of features (B, D): the score, or what rises with it, differentiable."""


@dataclass(frozen=True, eq=False)
class ODIN:
    """Maximum softmax probability at a high temperature, max_k softmax((W h + b) / tau)_k.

    Liang et al. 2018, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural
    Networks", eq. 1, of features of images that were moved by eq. 2.
    """

    layer: LinearLayer
    tau: float

    @classmethod
    def fit(cls, weight: Array, bias: Array | None = None, *, tau: float = 1000.0) -> Self:
        """From W (K, D) and b (K,); nothing is fitted to data.

        Raises:
            ValueError: Shapes do not fit, NaN or inf, or `tau` is not > 0.
        """
        check_positive(tau, "tau")
        return cls(LinearLayer.of(weight, bias), float(tau))

    def __call__(self, features: Array) -> Tensor:
        """Scores (N,) in (1/K, 1]."""
        return self.layer.walk(features, lambda rows: odin(self.layer.logits(rows), self.tau))

    def differentiable(self, rows: Tensor) -> Tensor:
        """The logarithm of the score (B,), differentiable."""
        return max_softmax(self.layer.logits(rows.to(self.layer.weight)), self.tau).log()


def odin(perturbed_logits: Array, tau: float = 1000.0) -> Tensor:
    """Maximum softmax probability at a high temperature, of inputs moved by `odin_perturb`.

    Liang et al. 2018, eq. 1-2.
    """
    check_positive(tau, "tau")
    return map_rows(
        lambda block: max_softmax(block, tau),
        perturbed_logits=as_tensor(perturbed_logits, "perturbed_logits", rank=2),
    )


def odin_perturb(
    images: Tensor, logits_fn: Callable[[Tensor], Tensor], eps: float, tau: float = 1000.0
) -> Tensor:
    """ODIN's input step, x - eps * sign(-grad_x log max_k softmax(f(x) / tau)_k).

    Liang et al. 2018, eq. 2. The step makes every image look more like its predicted class;
    in-distribution images follow it farther.

    Args:
        images: x (N, ...), floating-point, as `logits_fn` takes them.
        logits_fn: Maps images to logits (N, K), differentiably and each row on its own.
        eps: Size of the step in the units of `images`, >= 0.
        tau: Temperature, > 0.

    Returns:
        Perturbed images, detached, of the same shape and dtype.
    """
    check_positive(tau, "tau")
    return step_up(images, lambda moved: max_softmax(logits_fn(moved), tau).log(), eps)


def step_up(images: Tensor, score_fn: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    """X + eps * sign(grad_x score(x)), a step that raises every image's own score.

    Liang et al. 2018, eq. 2; Lee et al. 2018, "A Simple Unified Framework for Detecting OOD
    Samples", eq. 4. Gradients are enabled inside, whatever the caller's mode, and none flow out.

    Args:
        images: x (N, ...), floating-point, as `score_fn` takes them.
        score_fn: Maps images to scores (N,), differentiably and each row on its own.
        eps: Size of the step in the units of `images`, >= 0.

    Returns:
        The moved images, detached, of the same shape and dtype.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0, came {eps}")
    with torch.inference_mode(False), torch.enable_grad():
        inputs = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score_fn(inputs).sum(), inputs)
    # An image whose slope is not a number stays where it is, and stops no other one.
    return images.detach() + eps * torch.nan_to_num(gradient.sign())
