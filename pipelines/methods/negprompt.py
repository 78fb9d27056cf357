"""NegPrompt: negative prompts that images, and the classes' own prompts, are kept away from.

Li 2024, "Learning Transferable Negative Prompts for Out-of-Distribution Detection" (public code:
mala-lab/NegPrompt), with its three terms and their weights 1, 0.1 and 0.05:

    image_weight x mean of -log share of the positive prompts     images from negative prompts
    class_weight x mean cosine of a class's prompt and its negative ones
    spread_weight x mean cosine of a class's negative prompts with each other

The share is that of the positive prompts in the softmax over all prompts, sum_k e^{f_k} / (sum_k
e^{f_k} + sum_j e^{f-_j}). It is the one that the score neg_label turns into a detector, and none of
the first terms of the public code (by default a multi-label soft-margin loss whose targets are both
prompts of the image's class). The paper learns the positive prompts first and freezes them; here
both learn at once, so the terms move the positive prompts too. Judged by GL-MCM as in Zhu 2025;
neg_label judges by the negative prompts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
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
    """Cross-entropy + three terms of the negative prompts."""

    name: Literal["negprompt"] = "negprompt"
    head: AnyHead = NegPromptConfig()
    score: str = Field("gl_mcm", description="the selection criterion")
    image_weight: float = Field(1.0, ge=0, description="images away from negative prompts")
    class_weight: float = Field(0.1, ge=0, description="negative prompts away from their class's")
    spread_weight: float = Field(0.05, ge=0, description="negative prompts away from each other")
    needs_text_features: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_negatives(self) -> Config:
        if not isinstance(self.head, NegPromptConfig):
            raise ValueError(f"head={self.head.name} has no negative prompts; allowed: negprompt")
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the positive prompts, and the weighted terms of the negative ones."""
    if outputs.text_features is None:
        raise ValueError("negative prompts are compared with text features")
    negatives = outputs.extra["negatives"].float()
    positives = outputs.text_features.float()
    terms = {
        "images": (config.image_weight, _from_images(outputs, negatives)),
        "classes": (config.class_weight, (negatives * positives[:, None]).sum(dim=-1).mean()),
        "spread": (config.spread_weight, _alike(negatives)),
    }
    losses = {"cross_entropy": cross_entropy(outputs, batch)}
    losses.update({name: weight * term for name, (weight, term) in terms.items() if weight})
    figures = {f"negative/{name}": float(term.detach()) for name, (_, term) in terms.items()}
    return losses, {"accuracy": accuracy(outputs, batch), **figures}


def _from_images(outputs: Outputs, negatives: Tensor) -> Tensor:
    """Mean over images of minus the log of the positive prompts' share (nats)."""
    features = outputs.image_features.float()
    logits = outputs.logits.float()
    other = (features @ negatives.flatten(0, 1).T) * outputs.logit_scale
    inside = logits.logsumexp(dim=1)
    return (torch.cat((logits, other), dim=1).logsumexp(dim=1) - inside).mean()


def _alike(negatives: Tensor) -> Tensor:
    """Mean cosine over pairs of a class's negative prompts (K, M, D); 0 where there is one."""
    count = negatives.shape[1]
    if count == 1:
        return negatives.new_zeros(())
    products = negatives @ negatives.transpose(1, 2)
    others = products.sum(dim=(1, 2)) - products.diagonal(dim1=1, dim2=2).sum(dim=1)
    return others.mean() / (count * (count - 1))


PLUGIN = MethodPlugin(Config, loss)
