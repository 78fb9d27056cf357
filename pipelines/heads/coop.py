"""Context optimisation: the words before a class name become learned vectors.

Zhou 2022 (CoOp), equations 3 and 4. A prompt is [start][context][class name].[end] with the
class name at the end; `position` moves it to the front or the middle of the context, as the
paper's public code does. Contexts are N(0, 0.02), or the token embeddings of a phrase. The text
tower stays frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.backbones.text_tower import (
    TextTower,
    activation_bytes,
    encode_plain,
    encode_shared,
    text_tower,
)
from pipelines.config import UserError
from pipelines.heads import base, rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor
from pipelines.heads.parallel import Workers


class Config(HeadConfig):
    """Learned prompts."""

    name: Literal["coop"] = "coop"
    num_context: int = Field(16, ge=1, description="learned context tokens")
    init_phrase: str | None = Field(
        None, description="start from this phrase's tokens instead of N(0, 0.02)"
    )
    class_specific: bool = Field(False, description="one context a class instead of one for all")
    position: Literal["end", "middle", "front"] = Field(
        "end", description="where the class name stands in the context"
    )
    max_activation_memory: float = Field(
        4.0, gt=0, description="GiB of the text tower's activations above which they are recomputed"
    )
    class_parallel: ClassVar[bool] = True


class CoOp(nn.Module):
    """Learned context vectors in front of a frozen text tower."""

    def __init__(
        self,
        tower: TextTower,
        context: Tensor,
        tokens: Tensor,
        *,
        config: Config,
        logit_scale: float,
        class_names: tuple[str, ...],
    ) -> None:
        """Keep the tower and what of the prompts is not learned.

        Args:
            tower: the frozen text tower.
            context: initial context, (C, W) shared or (K, C, W) one a class.
            tokens: (K, L) tokens of "NAME." with start and end of text.
            config: where the class name stands, and how much memory activations may take.
            logit_scale: of the backbone.
            class_names: K names.
        """
        super().__init__()
        self.tower = tower
        self.config = config
        self.logit_scale = logit_scale
        self.class_names = class_names
        # With split="classes" each worker encodes its part of the prompts.
        self.workers = Workers()
        # Text features of this step that came from one pass for several heads.
        self.given: Tensor | None = None
        self.context = nn.Parameter(context)
        ends = tower.end_positions(tokens)
        kept = int(ends.max()) + 1
        embedded = tower.embed(tokens[:, :kept]).detach().float()
        self.register_buffer("embedded", embedded, persistent=False)
        self.register_buffer("ends", ends.to(embedded.device), persistent=False)

    def text_features(self) -> Tensor:
        """(K, D) unit length, with gradients to the context."""
        if self.given is not None:
            return self.given
        num_classes = len(self.class_names)
        divided = self.workers.split == "classes"
        part = self.workers.part(num_classes) if divided else slice(0, num_classes)
        encoded = F.normalize(self._encode_classes(part), dim=-1)
        return self.workers.gather(encoded, num_classes) if divided else encoded

    def _encode_classes(self, part: slice) -> Tensor:
        """Text features (k, D) of some of the classes, not normalised."""
        embedded: Tensor = self.embedded[part]  # type: ignore[index]
        ends: Tensor = self.ends[part]  # type: ignore[index]
        if self.config.position == "end" and self.context.ndim == 2:
            prefix = self.prefix()
            # Positions count from the start token, which the suffix does not hold.
            suffixes = embedded[:, 1:]
            recompute = self._recompute(len(prefix), suffixes.shape[0] * suffixes.shape[1])
            return encode_shared(self.tower, prefix, suffixes, ends - 1, recompute=recompute)
        context = self.context if self.context.ndim == 2 else self.context[part]
        prompts = self._prompts(embedded, context, ends.tolist())
        recompute = self._recompute(0, prompts.shape[0] * prompts.shape[1])
        return encode_plain(self.tower, prompts, ends + context.shape[-2], recompute=recompute)

    def prefix(self) -> Tensor:
        """Start token and context (1 + C, W), which all classes share."""
        start, _, _ = self.frozen()
        return torch.cat((start[0], self.context))

    def frozen(self) -> tuple[Tensor, Tensor, Tensor]:
        """What of the prompts is not learned, where the class name stands at the end.

        Returns:
            The start token (1, 1, W), what follows the context (K, S, W), and the position (K,)
            of the end-of-text token in that.
        """
        embedded: Tensor = self.embedded  # type: ignore[assignment]
        ends: Tensor = self.ends  # type: ignore[assignment]
        # Positions count from the start token, which the suffix does not hold.
        return embedded[:1, :1], embedded[:, 1:], ends - 1

    def _recompute(self, prefix: int, tokens: int) -> bool:
        expected = activation_bytes(self.tower, prefix, tokens)
        return expected > self.config.max_activation_memory * 2**30

    def _prompts(self, embedded: Tensor, context: Tensor, ends: list[int]) -> Tensor:
        """Whole prompts (k, 1 + C + S, W) for every position and kind of context."""
        context = context.expand(len(embedded), *context.shape[-2:])
        before = {"end": context.shape[1], "middle": context.shape[1] // 2, "front": 0}
        split = before[self.config.position]
        prompts = []
        for row, learned, end in zip(embedded, context, ends, strict=True):
            # "NAME." is name tokens, a full stop, the end of text; context after the name
            # stands before the full stop.
            name, rest = row[1 : end - 1], row[end - 1 :]
            prompts.append(torch.cat((row[:1], learned[:split], name, learned[split:], rest)))
        return torch.stack(prompts)

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features with every class's learned prompt."""
        text = self.text_features()
        return HeadOutput(image_features @ text.T, image_features, text)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The product with the text features of the prompts as they are now."""
        with torch.no_grad():
            text = self.text_features()
        return rules.text_predictor("coop", text, self.logit_scale, self.class_names)


def encodes_together(config: Config) -> bool:
    """Whether several heads of this shape can be encoded in one pass of the tower."""
    return config.position == "end" and not config.class_specific


def text_features_together(heads: Sequence[CoOp]) -> list[Tensor]:
    """Each head's text features (K, D), from one pass of the tower over their prefixes."""
    first = heads[0]
    _, suffixes, ends = first.frozen()
    prefixes = torch.stack([head.prefix() for head in heads])
    tokens = len(heads) * (suffixes.shape[0] * suffixes.shape[1] + prefixes.shape[1])
    expected = activation_bytes(first.tower, prefixes.shape[1], tokens)
    recompute = expected > first.config.max_activation_memory * 2**30
    encoded = encode_shared(first.tower, prefixes, suffixes, ends, recompute=recompute)
    return list(F.normalize(encoded, dim=-1))


def build(config: Config, context: HeadContext, seed: int) -> CoOp:
    """Prompts of the context's classes.

    Raises:
        UserError: where a prompt is longer than the text tower takes.
    """
    tower = text_tower(context.clip.model)
    initial = _initial_context(config, context, tower, seed)
    tokens = context.clip.tokenizer([f"{name}." for name in context.class_names])
    longest = int(tower.end_positions(tokens).max()) + 1 + initial.shape[-2]
    if longest > tower.context_length:
        allowed = tower.context_length - longest + initial.shape[-2]
        raise UserError(
            f"head.num_context={initial.shape[-2]}: with the longest class name a prompt has "
            f"{longest} tokens, the text tower takes {tower.context_length}; at most {allowed}"
        )
    return CoOp(
        tower,
        initial.to(context.features.device),
        tokens,
        config=config,
        logit_scale=context.clip.logit_scale,
        class_names=context.class_names,
    )


def _initial_context(config: Config, context: HeadContext, tower: TextTower, seed: int) -> Tensor:
    """(C, W), or (K, C, W) with one for each class."""
    num_classes = len(context.class_names)
    if config.init_phrase is None:
        shape: tuple[int, ...] = (config.num_context, tower.width)
        if config.class_specific:
            shape = (num_classes, *shape)
        return base.normal(shape, 0.02, seed)
    tokens = context.clip.tokenizer([config.init_phrase])
    end = int(tower.end_positions(tokens)[0])
    phrase = tower.embed(tokens[0, 1:end]).detach().float().clone()
    return phrase.repeat(num_classes, 1, 1) if config.class_specific else phrase


PLUGIN = HeadPlugin(
    Config,
    build,
    rules.text_similarity,
    compared=rules.unchanged,
    linear=rules.text_rule,
    encodes_together=encodes_together,
    encode_together=text_features_together,
)
