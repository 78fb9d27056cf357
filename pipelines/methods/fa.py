"""FA: prompts that must beat the frozen original ones at telling the classes.

Du 2025, "FA: Forced Prompt Learning of Vision-Language Models for Out-of-Distribution Detection"
(public code: 0xFAFA/FA, CustomCLIP.forward). The softmax of the cross-entropy runs over the forced
prompts f and, c = `head.coefficient` times, the original prompts o of all K classes; the forced
prompt of an image's class is its only target:

    mean of -log( e^{f_y} / (sum_k e^{f_k} + c sum_k e^{o_k}) )

Only the forced prompts learn. So a forced prompt gains where it says more of its class's images
than "a photo of a NAME." does. Judged by MCM and GL-MCM over all (1 + c) K prompts.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from pipelines.heads import AnyHead
from pipelines.heads.fa import ORIGINAL_SIMILARITY
from pipelines.heads.fa import Config as FAConfig
from pipelines.methods.base import (
    Batch,
    Losses,
    MethodConfig,
    MethodPlugin,
    Outputs,
    TrainingConfig,
    accuracy,
)


class Config(MethodConfig):
    """Cross-entropy over forced and original prompts."""

    name: Literal["fa"] = "fa"
    head: AnyHead = FAConfig()
    score: str = Field("gl_mcm", description="the selection criterion")
    training: TrainingConfig = TrainingConfig(epochs=50, warmup_epochs=0)

    @model_validator(mode="after")
    def _has_original_prompts(self) -> Config:
        if not isinstance(self.head, FAConfig):
            raise ValueError(f"head={self.head.name} has no original prompts; allowed: fa")
        return self


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy (nats) of the forced prompts among all, and the share they have of all."""
    assert isinstance(config.head, FAConfig)
    forced = outputs.logits.float()
    every = [forced]
    if config.head.coefficient:
        original = outputs.rows[ORIGINAL_SIMILARITY].float() * outputs.logit_scale
        # c equal terms of a sum are one with log c in the exponent.
        every.append(original + math.log(config.head.coefficient))
    logits = torch.cat(every, dim=1)
    share = (forced.logsumexp(dim=1) - logits.logsumexp(dim=1)).detach().exp().mean()
    losses = {"cross_entropy": F.cross_entropy(logits, batch.labels)}
    return losses, {"accuracy": accuracy(outputs, batch), "forced_share": float(share)}


PLUGIN = MethodPlugin(Config, loss)
