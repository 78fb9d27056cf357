"""Domain prompt learning: a network turns the mean feature of a batch into the prompts' context.

Zhang 2021 (DPLCLIP, arXiv 2111.12853), section 3: three linear layers with ReLUs turn features of
one domain's images into `num_context` tokens, which stand in front of every class name; public
code: shogi880/DPLCLIP (width 512, dropout 0.1, weights uniform by Xavier, biases 0.01).

Where it departs from the paper, and why. (1) The paper makes prompts from the test batch, so an
image's class depends on its neighbours; here the prompts that judge come from the mean of all
training features, so a row's score is its own, and the head is frozen to K text features.
(2) The network sees the mean feature; the public code averages the network's outputs. (3) Features
are of unit length, as the cache holds them. Outliers of a step are judged by the prompts of the
mean over its training images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.backbones.text_tower import activation_bytes, encode_shared
from pipelines.config import UserError
from pipelines.heads import base, coop, rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor


class Config(HeadConfig):
    """Prompts made from a mean feature."""

    name: Literal["dplclip"] = "dplclip"
    num_context: int = Field(16, ge=1, description="context tokens that the network makes")
    width: int = Field(512, ge=1, description="of the network's two hidden layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the hidden layers, in training")
    max_activation_memory: float = Field(
        4.0, gt=0, description="GiB of the text tower's activations above which they are recomputed"
    )
    # In training there is one set of text features for each domain of the batch.
    has_text_features: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("domains",)


class DPLCLIP(nn.Module):
    """A network from a mean feature (D,) to context tokens (C, W)."""

    def __init__(self, prompts: coop.CoOp, layers: list[nn.Linear], mean: Tensor, config: Config):
        """Keep CoOp's tower and class names.

        Args:
            prompts: CoOp's head, for what of the prompts is not learned.
            layers: D -> H -> H -> C x W.
            mean: (D,) the feature whose prompts judge.
            config: dropout and memory.
        """
        super().__init__()
        self.tower = prompts.tower
        self.logit_scale = prompts.logit_scale
        self.class_names = prompts.class_names
        self.config = config
        self.layers = nn.ModuleList(layers)
        start, suffixes, ends = prompts.frozen()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("suffixes", suffixes, persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    def text_features(self) -> Tensor:
        """Refused: in training each domain of a batch has text features of its own.

        Raises:
            UserError: always.
        """
        raise UserError("head=dplclip has no text features that all images share in training")

    def prompt_features(self, means: Tensor, *, dropout: float = 0.0) -> Tensor:
        """(M, K, D) unit text features of the prompts that each of (M, D) mean features makes."""
        hidden = means
        for layer in self.layers[:-1]:
            hidden = F.dropout(F.relu(layer(hidden)), dropout)
        context = self.layers[-1](hidden).unflatten(-1, (self.config.num_context, self.tower.width))
        start: Tensor = self.start  # type: ignore[assignment]
        suffixes: Tensor = self.suffixes  # type: ignore[assignment]
        prefixes = torch.cat((start.expand(len(means), -1, -1), context), dim=1)
        tokens = suffixes.shape[0] * suffixes.shape[1]
        expected = len(means) * activation_bytes(self.tower, prefixes.shape[1], tokens)
        recompute = expected > self.config.max_activation_memory * 2**30
        ends: Tensor = self.ends  # type: ignore[assignment]
        text = encode_shared(self.tower, prefixes, suffixes, ends, recompute=recompute)
        return F.normalize(text, dim=-1)

    def _judging_features(self) -> Tensor:
        """(K, D) text features by the mean of all training features."""
        mean: Tensor = self.mean  # type: ignore[assignment]
        return self.prompt_features(mean[None])[0]

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with the prompts of the training features' mean."""
        return HeadOutput(image_features @ self._judging_features().T, image_features)

    def encode_batch(self, image_features: Tensor, columns: Mapping[str, Tensor]) -> HeadOutput:
        """Cosines with the prompts of the mean over the batch's images of the same domain.

        Args:
            image_features: (N, D), the training images first.
            columns: `domains`, one number for each training image.
        """
        domains = columns["domains"]
        images = image_features[: len(domains)]
        present, place = torch.unique(domains, return_inverse=True)
        means = [images[domains == domain].mean(dim=0) for domain in present]
        num_outliers = len(image_features) - len(images)
        if num_outliers:
            means.append(images.mean(dim=0))
            place = torch.cat((place, place.new_full((num_outliers,), len(present))))
        text = self.prompt_features(torch.stack(means), dropout=self.config.dropout)
        by_domain = torch.einsum("nd,mkd->nmk", image_features, text)
        similarity = by_domain[torch.arange(len(place), device=place.device), place]
        return HeadOutput(similarity, image_features)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K), as `encode` gives it."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The product with the text features by the mean of all training features."""
        with torch.no_grad():
            text = self._judging_features()
        return rules.text_predictor("dplclip", text, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> DPLCLIP:
    """A network as the public code starts it, and the mean of the training features.

    Raises:
        UserError: where a prompt is longer than the text tower takes.
    """
    prompts = coop.build(coop.Config(num_context=config.num_context), context, seed)
    dim = context.features.shape[1]
    widths = (dim, config.width, config.width, config.num_context * prompts.tower.width)
    layers = []
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(fan_in, fan_out)
        bound = math.sqrt(6 / (fan_in + fan_out))
        with torch.no_grad():
            layer.weight.copy_(base.uniform((fan_out, fan_in), bound, seed + 1 + number))
            layer.bias.fill_(0.01)
        layers.append(layer)
    return DPLCLIP(prompts, layers, context.features.mean(dim=0), config)


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.text_similarity,
    compared=rules.unchanged,
    linear=rules.text_rule,
    encode_batch=DPLCLIP.encode_batch,
)
