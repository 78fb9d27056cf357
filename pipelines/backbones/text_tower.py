"""open_clip's text tower, run on prompts whose context is learned, without waste.

With image features cached, a step of prompt learning is the text tower over K classes. Two
facts make it cheap, both exact because the tower is causal (a token sees only those before it):

1. Nothing after the end-of-text token reaches the feature, so nothing after it is run.
2. A prefix that all classes share (start token and context) has the same activations for every
   class: it runs once per layer, and its keys and values serve the tokens of every class. Where
   each image has a prefix of its own (CoCoOp), it runs once per image, not once per image and
   class, and what the class names alone decide runs once for all images.

With `recompute` a layer's activations are dropped after the forward pass and computed again in
the backward pass: the same numbers, a third more time, and only each layer's input in memory.

Radford 2021 (CLIP) for the tower; Zhou 2022 (CoOp) for the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelines.config import UserError


@dataclass(frozen=True)
class TextTower:
    """The parts of an open_clip text tower that prompt learning needs; weights are shared."""

    token_embedding: nn.Embedding
    positional_embedding: Tensor
    blocks: tuple[nn.Module, ...]
    ln_final: nn.Module
    projection: nn.Module | Tensor | None
    pool: str
    end_id: int | None
    context_length: int

    @property
    def width(self) -> int:
        """Width of a token embedding."""
        return self.token_embedding.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """The type that the blocks compute in."""
        dtype: torch.dtype = self.blocks[0].mlp.c_fc.weight.dtype  # type: ignore[union-attr, assignment]
        return dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (..., W) of `tokens`, without positions."""
        embedded: Tensor = self.token_embedding(tokens.to(self.token_embedding.weight.device))
        return embedded

    def end_positions(self, tokens: Tensor) -> Tensor:
        """Position (K,) of the end-of-text token that open_clip would pool in `tokens` (K, L)."""
        if self.pool == "eos":
            return torch.eq(tokens, self.end_id or 0).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)


def text_tower(model: Any) -> TextTower:
    """The text tower of an open_clip `CLIP` or `CustomTextCLIP`.

    Raises:
        UserError: where the tower is not causal or does not pool its end-of-text token.
    """
    tower = getattr(model, "text", model)
    pool = str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "none")))
    causal = getattr(tower, "attn_mask", None) is not None
    if not causal or pool not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
        raise UserError(
            f"learned prompts need a causal text tower that pools its end-of-text token; "
            f"this one pools {pool!r}{'' if causal else ' without a causal mask'}"
        )
    return TextTower(
        token_embedding=tower.token_embedding,
        positional_embedding=tower.positional_embedding,
        blocks=tuple(tower.transformer.resblocks),
        ln_final=tower.ln_final,
        projection=tower.text_projection,
        pool=pool,
        end_id=getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)),
        context_length=int(tower.context_length),
    )


def encode_plain(
    tower: TextTower, prompts: Tensor, ends: Tensor, *, recompute: bool = False
) -> Tensor:
    """Text features of whole prompts through the tower's own blocks.

    Args:
        tower: the text tower.
        prompts: (K, L, W) token embeddings without positions; cut after the last end-of-text.
        ends: (K,) position of each prompt's end-of-text token.
        recompute: keep only each layer's input until the backward pass.

    Returns:
        (K, D) float32, not normalised.
    """
    length = prompts.shape[1]
    x = _place(tower, prompts, 0)
    mask = _causal_mask(length, length, x)
    for block in tower.blocks:
        x = _layer(recompute, _plain_block, block, x, mask)
    return _project(tower, _pick(x, ends))


def encode_shared(
    tower: TextTower, prefix: Tensor, suffixes: Tensor, ends: Tensor, *, recompute: bool = False
) -> Tensor:
    """Text features of prompts that begin with one shared prefix.

    Args:
        tower: the text tower.
        prefix: (P, W) token embeddings that every prompt starts with, or (B, P, W): B of them.
        suffixes: (K, S, W) token embeddings that follow, padded after the end-of-text token.
        ends: (K,) position of the end-of-text token inside the suffix.
        recompute: keep only each layer's input until the backward pass.

    Returns:
        (K, D) or (B, K, D), not normalised: equal to `encode_plain` of the joined prompts.
        float32, or float64 where the tower is.
    """
    if not is_standard(tower):
        return _encode_joined(tower, prefix, suffixes, ends, recompute=recompute)
    shared = _place(tower, prefix, 0)
    # Without an axis for B until the prefix has been attended to: the same for all prefixes.
    x = _place(tower, suffixes, prefix.shape[-2])
    mask = _causal_mask(x.shape[1], x.shape[1], x)
    for block in tower.blocks[:-1]:
        shared, x = _layer(recompute, _shared_block, block, shared, x, mask)
    return _project(tower, _last_block(tower.blocks[-1], shared, x, ends))


def _encode_joined(
    tower: TextTower, prefix: Tensor, suffixes: Tensor, ends: Tensor, *, recompute: bool
) -> Tensor:
    """What `encode_shared` gives, by whole prompts."""
    count, length = suffixes.shape[0], prefix.shape[-2]
    many = prefix.reshape(-1, 1, length, tower.width).expand(-1, count, -1, -1)
    joined = torch.cat((many, suffixes.expand(len(many), -1, -1, -1)), dim=2).flatten(0, 1)
    all_ends = (ends + length).repeat(len(many))
    encoded = encode_plain(tower, joined, all_ends, recompute=recompute)
    return encoded.reshape(*prefix.shape[:-2], count, -1)


def is_standard(tower: TextTower) -> bool:
    """Whether every block is the usual one, whose parts can be run one by one."""
    return all(_is_standard(block) for block in tower.blocks)


def activation_bytes(tower: TextTower, prefix: int, tokens: int) -> int:
    """Memory that the backward pass keeps for `tokens` class tokens after a shared prefix.

    A layer keeps, of each token, the inputs of both norms and of the MLP's activation, queries,
    keys, values and the attention weights over the prefix, some of them twice.
    """
    hidden = int(tower.blocks[0].mlp.c_fc.out_features)  # type: ignore[union-attr, arg-type]
    heads = int(tower.blocks[0].attn.num_heads)  # type: ignore[union-attr, arg-type]
    floats = 7 * tower.width + hidden + 2 * heads * (prefix + 8)
    return 4 * floats * len(tower.blocks) * (tokens + prefix)


def _layer(recompute: bool, function: Any, *arguments: Any) -> Any:
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def _plain_block(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = block(x, attn_mask=mask)
    return out


def _place(tower: TextTower, embeddings: Tensor, start: int) -> Tensor:
    """Embeddings (..., L, W) plus the positions from `start` on, in the tower's type."""
    stop = start + embeddings.shape[-2]
    if stop > tower.context_length:
        raise ValueError(f"a prompt of {stop} tokens; the tower takes {tower.context_length}")
    positions = tower.positional_embedding[start:stop].to(tower.dtype)
    return embeddings.to(tower.dtype) + positions


def _project(tower: TextTower, pooled: Tensor) -> Tensor:
    pooled = tower.ln_final(pooled)
    if isinstance(tower.projection, nn.Module):
        pooled = tower.projection(pooled)
    elif tower.projection is not None:
        pooled = pooled @ tower.projection
    return pooled if pooled.dtype == torch.float64 else pooled.float()


def _pick(x: Tensor, positions: Tensor) -> Tensor:
    """Row `positions[k]` of each x[..., k]: (..., K, L, W) -> (..., K, W)."""
    return x[..., torch.arange(x.shape[-3], device=x.device), positions, :]


def _causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """Additive mask (queries, keys); the last query sees every key."""
    mask = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(1 + keys - queries)


def _is_standard(block: nn.Module) -> bool:
    attention = getattr(block, "attn", None)
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not hasattr(block, "ln_1_kv")
    )


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., L, W) -> (..., heads, L, W / heads)."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).transpose(-2, -3)


def _project_in(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (..., heads, L, d), of a block's normalised input."""
    attention = block.attn
    joint = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = joint.chunk(3, dim=-1)
    count = attention.num_heads
    return _heads(queries, count), _heads(keys, count), _heads(values, count)


def _finish(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block after attention (..., heads, L, d): output, residuals, MLP."""
    merged = attended.transpose(-2, -3).flatten(-2)
    x = x + block.ls_1(block.attn.out_proj(merged))
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def _attend(
    queries: Tensor, shared: tuple[Tensor, Tensor], suffix: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    """Attention of (K, H, Q, d) queries over shared (H, P, d) and the suffix's (K, H, S, d) keys.

    Any of them may have an axis of B prefixes in front. The product with the shared keys is one
    matrix per head for all classes: copies of the prefix's keys and values per class are never
    made.
    """
    num_classes, num_heads, length, dim = queries.shape[-4:]
    queries = queries * dim**-0.5
    by_head = queries.transpose(-4, -3).reshape(
        *queries.shape[:-4], num_heads, num_classes * length, dim
    )
    to_shared = by_head @ shared[0].transpose(-1, -2)
    to_shared = _by_class(to_shared, num_classes)
    to_suffix = queries @ suffix[0].transpose(-1, -2) + mask
    to_suffix = to_suffix.expand(*to_shared.shape[:-1], -1)
    weights = torch.cat((to_shared, to_suffix), dim=-1).softmax(dim=-1)
    prefix = shared[0].shape[-2]
    on_shared = weights[..., :prefix].transpose(-4, -3).flatten(-3, -2)
    out: Tensor = _by_class(on_shared @ shared[1], num_classes) + weights[..., prefix:] @ suffix[1]
    return out


def _by_class(x: Tensor, num_classes: int) -> Tensor:
    """(..., H, K Q, d) -> (..., K, H, Q, d)."""
    by_class = (num_classes, x.shape[-2] // num_classes, x.shape[-1])
    return x.reshape(*x.shape[:-2], *by_class).transpose(-4, -3)


def _shared_block(block: Any, shared: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One layer for the prefix (P, W), run once, and for the suffixes (K, S, W)."""
    queries, keys, values = _project_in(block, shared)
    x_queries, x_keys, x_values = _project_in(block, x)
    attended = _attend(x_queries, (keys, values), (x_keys, x_values), mask)
    q, k, v = (part.reshape(-1, *part.shape[-3:]) for part in (queries, keys, values))
    alone = F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(queries.shape)
    return _finish(block, shared, alone), _finish(block, x, attended)


def _last_block(block: Any, shared: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The last layer, only for what is read from it: the end-of-text tokens, (..., K, W)."""
    _, keys, values = _project_in(block, shared)
    queries, x_keys, x_values = _project_in(block, x)
    rows = torch.arange(x.shape[-3], device=x.device)
    at_end = queries.transpose(-3, -2)[..., rows, ends, :, :].unsqueeze(-2)
    mask = _causal_mask(x.shape[-2], x.shape[-2], x)[ends][:, None, None, :]
    attended = _attend(at_end, (keys, values), (x_keys, x_values), mask)
    return _finish(block, _pick(x, ends).unsqueeze(-2), attended).squeeze(-2)
