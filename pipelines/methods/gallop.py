"""GalLoP: cross-entropy of global prompts with dropout, and of each local prompt.

Lafon 2024, "GalLoP: Learning Global and Local Prompts for Vision-Language Models", sections 3.2
and 3.3 (public code: MarcLafon/gallop). In training each image sees a few of the global prompts,
drawn anew at every step, so that no two learn the same; its global similarity is their mean.
Every local prompt has a cross-entropy of its own, and the local loss is their mean.

    cross-entropy of the drawn global prompts + mean cross-entropy of the local prompts

Judged by GL-MCM.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.gallop import Config as GalLoPConfig
from pipelines.methods.base import Batch, Losses, MethodConfig, MethodPlugin, Outputs, accuracy


class Config(MethodConfig):
    """Cross-entropy of global and of local prompts."""

    name: Literal["gallop"] = "gallop"
    head: AnyHead = GalLoPConfig()
    score: str = Field("gl_mcm", description="the selection criterion")
    dropout: float = Field(
        0.75, ge=0, lt=1, description="share of the global prompts that an image does not see"
    )

    @model_validator(mode="after")
    def _has_prompts(self) -> Config:
        if not isinstance(self.head, GalLoPConfig):
            raise ValueError(f"head={self.head.name} has no global and local prompts; use gallop")
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the mean of the drawn global prompts, and that of each local prompt."""
    scale = outputs.logit_scale
    drawn = _drawn(outputs.rows["global"], config.dropout).float() * scale
    losses = {"cross_entropy": F.cross_entropy(drawn, batch.labels)}
    if "local" in outputs.rows:
        local = outputs.rows["local"].float() * scale
        labels = batch.labels[:, None].expand(local.shape[:2])
        losses["local"] = F.cross_entropy(local.flatten(0, 1), labels.flatten())
    return losses, {"accuracy": accuracy(outputs, batch)}


def _drawn(similarity: Tensor, dropout: float) -> Tensor:
    """(N, K): the mean over a draw of each image's G prompts, of (N, G, K)."""
    count = similarity.shape[1]
    kept = max(1, count - int(dropout * count))
    if kept == count:
        return similarity.mean(dim=1)
    # On the CPU, so that every device and worker draws the same.
    order = torch.rand(similarity.shape[:2]).argsort(dim=1)[:, :kept].to(similarity.device)
    return similarity.gather(1, order[:, :, None].expand(-1, -1, similarity.shape[2])).mean(dim=1)


PLUGIN = MethodPlugin(Config, loss)
