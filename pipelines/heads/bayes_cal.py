"""Bayes-CAL's head: learned prompts whose context is a Gaussian, and prompts of the domains.

Zhu 2023 (Bayesian cross-modal alignment learning for few-shot out-of-distribution generalization,
AAAI 2023, arXiv 2504.09448); public code: LinLLLL/BayesCAL. Every entry of the context is
N(mean, std^2) with mean and std learned; a training step draws one context, judging takes the
mean. The prior is N(start, prior_std^2). A second set of prompts describes the domain of an image;
it serves `pipelines.methods.bayes_cal`'s losses and is not saved.

Domains are numbers here, so their prompts are "[context] domain." with a context for each,
where the public code puts the domain's name behind a context shared by all. The public code draws
mean + std^2 x noise and has the KL divergence of neither; here both are the Gaussian's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.backbones.text_tower import activation_bytes, encode_shared
from pipelines.heads import coop, rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor


class Config(HeadConfig):
    """Prompts with a Gaussian context."""

    name: Literal["bayes_cal"] = "bayes_cal"
    num_context: int = Field(4, ge=1, description="learned context tokens")
    init_phrase: str | None = Field(
        None, description="start from this phrase's tokens instead of N(0, 0.02)"
    )
    init_std: float = Field(1e-3, gt=0, description="standard deviation of the context at first")
    prior_std: float = Field(0.02, gt=0, description="standard deviation of the context's prior")
    max_activation_memory: float = Field(
        4.0, gt=0, description="GiB of the text tower's activations above which they are recomputed"
    )
    columns: ClassVar[tuple[str, ...]] = ("domains",)


class _Prompts(nn.Module):
    """Names behind contexts that are Gaussian."""

    def __init__(self, prompts: coop.CoOp, config: Config) -> None:
        """Start at CoOp's context, (C, W) for all names or (M, C, W) for each of M equal names."""
        super().__init__()
        self.tower = prompts.tower
        self.config = config
        context = prompts.context.detach()
        shared = context.ndim == 2
        start, suffixes, ends = prompts.frozen()
        self.mean = nn.Parameter(context.clone())
        self.log_std = nn.Parameter(torch.full_like(context, config.init_std).log())
        self.register_buffer("prior_mean", context.clone(), persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("suffixes", suffixes if shared else suffixes[:1], persistent=False)
        self.register_buffer("ends", ends if shared else ends[:1], persistent=False)

    def features(self, *, draw: bool) -> Tensor:
        """(K, D) unit text features of the mean context, or of one that is drawn."""
        context: Tensor = self.mean
        if draw:
            context = context + self.log_std.exp() * torch.randn_like(context)
        prefixes = context.reshape(-1, *context.shape[-2:])
        start: Tensor = self.start  # type: ignore[assignment]
        suffixes: Tensor = self.suffixes  # type: ignore[assignment]
        ends: Tensor = self.ends  # type: ignore[assignment]
        prefixes = torch.cat((start.expand(len(prefixes), -1, -1), prefixes), dim=1)
        tokens = suffixes.shape[0] * suffixes.shape[1]
        expected = len(prefixes) * activation_bytes(self.tower, prefixes.shape[1], tokens)
        recompute = expected > self.config.max_activation_memory * 2**30
        text = encode_shared(self.tower, prefixes, suffixes, ends, recompute=recompute)
        # Either one prefix and K names, or M prefixes and one name.
        return F.normalize(text.flatten(0, 1), dim=-1)

    def divergence(self) -> Tensor:
        """KL divergence of the context from its prior (nats), a sum over all entries."""
        log_prior = torch.tensor(self.config.prior_std).log().to(self.log_std)
        prior_mean: Tensor = self.prior_mean  # type: ignore[assignment]
        squares = (2 * self.log_std).exp() + (self.mean - prior_mean).square()
        ratio = squares / (2 * self.config.prior_std**2)
        return (log_prior - self.log_std + ratio - 0.5).sum()


class BayesCAL(nn.Module):
    """Gaussian prompts of the classes, and of the domains where there are several."""

    def __init__(
        self,
        classes: coop.CoOp,
        domains: coop.CoOp | None,
        config: Config,
    ) -> None:
        """Keep CoOp's towers and names.

        Args:
            classes: CoOp's head with a shared context.
            domains: CoOp's head with a context for each of M domains; None where there is one.
            config: spreads and memory.
        """
        super().__init__()
        self.logit_scale = classes.logit_scale
        self.class_names = classes.class_names
        self.classes = _Prompts(classes, config)
        self.domains = _Prompts(domains, config) if domains is not None else None

    def text_features(self) -> Tensor:
        """(K, D) unit length, of the mean context."""
        return self.classes.features(draw=False)

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with the prompts of the mean context."""
        text = self.text_features()
        return HeadOutput(image_features @ text.T, image_features, text)

    def encode_batch(self, image_features: Tensor, columns: Mapping[str, Tensor]) -> HeadOutput:  # noqa: ARG002
        """Cosines with the prompts of a drawn context.

        `extra` has the divergence `kl` (a number) and, where there are several domains,
        `domain_text` (M, D).
        """
        text = self.classes.features(draw=True)
        extra = {"kl": self.classes.divergence()}
        if self.domains is not None:
            extra["kl"] = extra["kl"] + self.domains.divergence()
            extra["domain_text"] = self.domains.features(draw=True)
        return HeadOutput(image_features @ text.T, image_features, text, extra=extra)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K), as `encode` gives it."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The product with the text features of the mean context."""
        with torch.no_grad():
            text = self.text_features()
        return rules.text_predictor("bayes_cal", text, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> BayesCAL:
    """Means as CoOp's context starts; domains' contexts N(0, 0.02), one each.

    Raises:
        UserError: where a prompt is longer than the text tower takes.
    """
    same = {"num_context": config.num_context, "init_phrase": config.init_phrase}
    classes = coop.build(coop.Config(**same), context, seed)
    num_domains = int(context.columns["domains"].max()) + 1 if "domains" in context.columns else 1
    domains = None
    if num_domains > 1:
        settings = coop.Config(num_context=config.num_context, class_specific=True)
        names = replace(context, class_names=("domain",) * num_domains)
        domains = coop.build(settings, names, seed + 1)
    return BayesCAL(classes, domains, config)


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.text_similarity,
    compared=rules.unchanged,
    linear=rules.text_rule,
    encode_batch=BayesCAL.encode_batch,
)
