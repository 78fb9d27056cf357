"""LoCoOp: learned prompts that are unsure of what in a training image is not its class.

Miyai 2023, "LoCoOp: Few-Shot Out-of-Distribution Detection via Prompt Learning", equations 5 to 8
(public code: AtsuMiyai/LoCoOp). A local feature whose `top_share` most likely classes omit
the image's label counts as out of distribution; the entropy of its class probabilities is raised:

    cross-entropy - weight x mean entropy of those local features

The paper takes the top 200 of 1000 classes, weight 0.25, and judges by MCM and GL-MCM. The mean
is over all such features of the batch; without any it is 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipelines.heads import AnyHead
from pipelines.heads.base import LOCAL
from pipelines.heads.coop import Config as CoOpConfig
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
    """Cross-entropy - weight x entropy of local features without the class."""

    name: Literal["locoop"] = "locoop"
    head: AnyHead = CoOpConfig()
    score: str = Field("gl_mcm", description="the selection criterion")
    weight: float = Field(0.25, ge=0, description="of the local features' entropy; 0 is CoOp")
    top_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the classes that count as a local feature's likely ones",
    )
    needs_text_features: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (LOCAL,)


def num_top(config: Config, num_classes: int) -> int:
    """How many classes count as a local feature's likely ones: at least one, never all."""
    return max(1, min(num_classes - 1, round(config.top_share * num_classes)))


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """Cross-entropy of the logits, less the weighted entropy of features without the class."""
    if outputs.text_features is None:
        raise ValueError("local features are compared with text features")
    losses = {"cross_entropy": cross_entropy(outputs, batch)}
    report = {"accuracy": accuracy(outputs, batch)}
    # Without it the graph of the entropy would still be walked, for gradients of zero.
    if config.weight:
        entropy, share = _local_entropy(outputs.text_features, outputs, batch, config)
        losses["entropy"] = -config.weight * entropy
        report.update({"patch_entropy": float(entropy.detach()), "patches_without_class": share})
    return losses, report


def _local_entropy(
    text: Tensor, outputs: Outputs, batch: Batch, config: Config
) -> tuple[Tensor, float]:
    """Mean entropy (nats) of the local features without the class, and their share of all."""
    local = batch.columns[LOCAL].float()
    logits = (local @ text.float().T) * outputs.logit_scale
    top = logits.topk(num_top(config, logits.shape[-1]), dim=-1).indices
    without = ~(top == batch.labels[:, None, None]).any(dim=-1)
    chosen = logits[without].log_softmax(dim=-1)
    entropies = -(chosen.exp() * chosen).sum(dim=-1)
    # A sum over nothing, rather than a mean over nothing.
    mean = entropies.sum() / max(1, len(entropies))
    return mean, float(without.float().mean())


PLUGIN = MethodPlugin(Config, loss)
