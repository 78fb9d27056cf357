"""NegPrompt: negative prompts that images, and the classes' own prompts, are kept away from.

Li 2024, "Learning Transferable Negative Prompts for Out-of-Distribution Detection" (public code:
mala-lab/NegPrompt), with its three terms and their weights 1, 0.1 and 0.05. `objective=paper`:

    image_weight x mean of -log share of the positive prompts     images from negative prompts
    class_weight x mean cosine of a class's prompt and its negative ones
    spread_weight x mean cosine of a class's negative prompts with each other

The share is that of the positive prompts in the softmax over all prompts, sum_k e^{f_k} / (sum_k
e^{f_k} + sum_j e^{f-_j}). It is the one that the score neg_label turns into a detector. All
prompts learn at once, with cross-entropy of the positive ones, so the terms move these too.

`objective=published` is what the public code does by default, in its stages one and three: first
cross-entropy alone teaches the positive prompts; then these are frozen, the negative ones begin
beside them, and the three terms teach those. There the first term is a multi-label soft-margin
loss of all K (1 + M) prompts, whose targets are the positive AND the negative prompts of an
image's class, and the third is the length of the mean of a class's negative prompts, sqrt(1 / M +
(1 - 1 / M) x their mean cosine). The code's second and third term are 1 less, which moves nothing.
Its score is neg_mcm; the default is GL-MCM as in Zhu 2025.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.negprompt import Config as NegPromptConfig
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
    """Cross-entropy and three terms of the negative prompts, together or one after the other."""

    name: Literal["negprompt"] = "negprompt"
    head: AnyHead = NegPromptConfig()
    score: str = Field("gl_mcm", description="the selection criterion")
    objective: Literal["paper", "published"] = Field(
        "paper",
        description="published: as the public code, a multi-label term and two stages of "
        "training.epochs, positive prompts before negative ones",
    )
    image_weight: float = Field(1.0, ge=0, description="images away from negative prompts")
    class_weight: float = Field(0.1, ge=0, description="negative prompts away from their class's")
    spread_weight: float = Field(0.05, ge=0, description="negative prompts away from each other")
    needs_text_features: ClassVar[bool] = True

    @property
    def num_stages(self) -> int:
        """Positive prompts before negative ones, or all at once."""
        return 2 if self.objective == "published" else 1

    @model_validator(mode="after")
    def _has_negatives(self) -> Config:
        if not isinstance(self.head, NegPromptConfig):
            raise ValueError(f"head={self.head.name} has no negative prompts; allowed: negprompt")
        if self.objective == "published" and not any(self.weights.values()):
            raise ValueError(
                "objective=published: with image_weight, class_weight and spread_weight all 0 "
                "nothing teaches the negative prompts; give one of them more"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """By term."""
        return {
            "images": self.image_weight,
            "classes": self.class_weight,
            "spread": self.spread_weight,
        }


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the positive prompts, and the weighted terms of negative ones that learn."""
    if outputs.text_features is None:
        raise ValueError("negative prompts are compared with text features")
    negatives = outputs.extra.get("negatives")
    terms = {} if negatives is None else _terms(outputs, batch, config, negatives.float())
    losses, weights = {"cross_entropy": cross_entropy(outputs, batch)}, config.weights
    losses.update({name: weights[name] * term for name, term in terms.items() if weights[name]})
    figures = {f"negative/{name}": float(term.detach()) for name, term in terms.items()}
    return losses, {"accuracy": accuracy(outputs, batch), **figures}


def _terms(outputs: Outputs, batch: Batch, config: Config, negatives: Tensor) -> dict[str, Tensor]:
    """The three terms of negative prompts (K, M, D), not weighted."""
    assert outputs.text_features is not None
    positives, logits = outputs.text_features.float(), outputs.logits.float()
    other = (outputs.image_features.float() @ negatives.flatten(0, 1).T) * outputs.logit_scale
    published = config.objective == "published"
    labels = batch.labels
    images = multi_label(logits, other, labels) if published else _missing_share(logits, other)
    return {
        "images": images,
        "classes": (negatives * positives[:, None]).sum(dim=-1).mean(),
        "spread": _length(negatives) if published else _alike(negatives),
    }


def _missing_share(logits: Tensor, other: Tensor) -> Tensor:
    """Mean over images of minus the log of the positive prompts' share (nats).

    Args:
        logits: (N, K) of the positive prompts.
        other: (N, K M) of the negative ones.
    """
    inside = logits.logsumexp(dim=1)
    return (torch.cat((logits, other), dim=1).logsumexp(dim=1) - inside).mean()


def multi_label(logits: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """Mean over images and prompts of the binary cross-entropy of each prompt (nats).

    An image's targets are the positive and the negative prompts of its class.

    Args:
        logits: (N, K) of the positive prompts.
        other: (N, K M) of the negative ones, those of a class side by side.
        labels: (N,).
    """
    targets = F.one_hot(labels, logits.shape[1]).to(logits)
    of_others = targets.repeat_interleave(other.shape[1] // logits.shape[1], dim=1)
    return F.multilabel_soft_margin_loss(
        torch.cat((logits, other), dim=1), torch.cat((targets, of_others), dim=1)
    )


def _length(negatives: Tensor) -> Tensor:
    """Mean over classes of the length of the mean of a class's negative prompts (K, M, D)."""
    lengths: Tensor = negatives.mean(dim=1).norm(dim=-1)
    return lengths.mean()


def _alike(negatives: Tensor) -> Tensor:
    """Mean cosine over pairs of a class's negative prompts (K, M, D); 0 where there is one."""
    count = negatives.shape[1]
    if count == 1:
        return negatives.new_zeros(())
    products = negatives @ negatives.transpose(1, 2)
    others = products.sum(dim=(1, 2)) - products.diagonal(dim1=1, dim2=2).sum(dim=1)
    return others.mean() / (count * (count - 1))


PLUGIN = MethodPlugin(Config, loss)
