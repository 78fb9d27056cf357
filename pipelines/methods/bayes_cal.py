"""Bayes-CAL: Gaussian prompts, trained to tell classes alike in every domain.

Zhu 2023 (AAAI 2023, arXiv 2504.09448), with the weights of the public code (LinLLLL/BayesCAL):

    cross-entropy + domain_weight x cross-entropy of the domains' prompts
                  + irm_weight x sum over domains of (d/ds cross-entropy of s x logits at s = 1)^2
                  + orthogonality_weight x sum over images of cos^2(g, h)
                  + kl_weight x KL(context || prior)

g and h are the gradients of an image's class and domain cross-entropy with respect to its feature:
what tells the class apart should not tell the domain. The public code holds g and h fixed, so that
its orthogonality term moves nothing; here it does. Sums over the batch are the public code's.
With one domain there is nothing to be alike in: the three domain terms are left out, and what
remains is CoOp with a Gaussian context.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.bayes_cal import Config as BayesCALConfig
from pipelines.methods.base import (
    Batch,
    Losses,
    MethodConfig,
    MethodPlugin,
    Outputs,
    accuracy,
    cross_entropy,
)


class Config(MethodConfig):
    """Weights of the terms beside cross-entropy."""

    name: Literal["bayes_cal"] = "bayes_cal"
    head: AnyHead = BayesCALConfig()
    score: str = Field("mcm", description="the selection criterion")
    domain_weight: float = Field(0.01, ge=0, description="of the domains' cross-entropy")
    irm_weight: float = Field(0.5, ge=0, description="of the invariant-risk penalty")
    orthogonality_weight: float = Field(
        0.01, ge=0, description="of the squared cosine between class and domain gradients"
    )
    kl_weight: float = Field(1e-8, ge=0, description="of the context's divergence from its prior")
    columns: ClassVar[tuple[str, ...]] = ("domains",)

    @model_validator(mode="after")
    def _check_prompts(self) -> Config:
        if self.head.name != "bayes_cal":
            raise ValueError(
                f"head={self.head.name}: method bayes_cal needs the Gaussian prompts and the "
                "domain prompts of its own head; allowed: bayes_cal. For that head's "
                "cross-entropy take name=cross_entropy"
            )
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """The five terms, weighted; three of them where there are several domains.

    Args:
        outputs: of the head `bayes_cal`: `kl` and perhaps `domain_text` (M, D) in `extra`.
        batch: labels and the column `domains`, (N,) each.
        config: the weights.
    """
    losses = {
        "cross_entropy": cross_entropy(outputs, batch),
        "kl": config.kl_weight * outputs.extra["kl"],
    }
    report = {"accuracy": accuracy(outputs, batch)}
    domain_text = outputs.extra.get("domain_text")
    if domain_text is None:
        return losses, report
    assert outputs.text_features is not None
    domains, images = batch.columns["domains"], outputs.image_features.float()
    domain_logits = outputs.logit_scale * (images @ domain_text.T)
    losses["domain"] = config.domain_weight * F.cross_entropy(domain_logits, domains)
    losses["irm"] = config.irm_weight * irm_penalty(outputs.logits.float(), batch.labels, domains)
    gradients = (
        feature_gradient(images, outputs.logits.float(), outputs.text_features, batch.labels),
        feature_gradient(images, domain_logits, domain_text, domains),
    )
    losses["orthogonality"] = config.orthogonality_weight * squared_cosines(*gradients).sum()
    report["domain_accuracy"] = float((domain_logits.argmax(dim=1) == domains).float().mean())
    return losses, report


def irm_penalty(logits: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
    """Sum over the domains present of (d/ds mean cross-entropy of s x logits at s = 1)^2.

    Arjovsky 2019 (Invariant risk minimization), IRMv1. The derivative of an image's term is the
    sum over classes of (probability - one-hot) x logit.
    """
    wrong = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
    slopes = (wrong * logits).sum(dim=1)
    means = [slopes[domains == domain].mean() for domain in torch.unique(domains)]
    return torch.stack(means).square().sum()


def feature_gradient(features: Tensor, logits: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Gradient (N, D), up to the logits' scale, of each image's cross-entropy in its feature.

    Along the sphere: logits depend on the direction of a feature (N, D) alone.
    """
    wrong = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
    free = wrong @ text
    return free - (free * features).sum(dim=1, keepdim=True) * features


def squared_cosines(first: Tensor, second: Tensor) -> Tensor:
    """cos^2 (N,) between rows; towards 0 where a gradient vanishes."""
    first, second = (rows / (rows.norm(dim=1, keepdim=True) + 1e-6) for rows in (first, second))
    return (first * second).sum(dim=1).square()


PLUGIN = MethodPlugin(Config, loss)
