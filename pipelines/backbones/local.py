"""Local features: what each region of an image says by itself, in the space of the text features.

GL-MCM (Miyai et al. 2023), LoCoOp and GalLoP compare them with classes. A token of a trained
CLIP's image tower is taken through the last layer's *value path*: value and output projection
without attention, so that nothing of the other tokens is mixed in (Zhou et al. 2022, MaskCLIP).
The output of open_clip's `forward_intermediates` is mixed and is not that.

A tower whose feature is a projection of the mean over places needs no such path: the projection
of each place is exact, the image's feature before normalisation is the mean of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import UserError


def encode_with_local(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Image features (N, D) and local features (N, P, D) in one pass; neither is normalised.

    Args:
        model: open_clip's CLIP with a VisionTransformer, a ModifiedResNet, or timm's EfficientNet
            or ResNet under mean pooling and a linear projection.
        pixels: (N, 3, H, W).

    Raises:
        UserError: for another tower.
    """
    last, project = _value_path(model.visual)
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        features = model.encode_image(pixels)
    finally:
        hook.remove()
    return features, project(seen[0])


def _value_path(visual: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The layer whose input is wanted, and what makes local features of that input."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return visual.attnpool, lambda x: _pool_values(visual.attnpool, x)
    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None
    if plain and isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock):
        return visual.transformer.resblocks[-1], lambda x: _block_values(visual, x)
    if isinstance(visual, TimmModel) and _projects_the_mean(visual):
        return visual.trunk.global_pool, lambda x: visual.head(x.flatten(2).transpose(1, 2))
    raise UserError(
        f"local_features: the image tower {type(visual).__name__} has no known value path; "
        "allowed: open_clip's VisionTransformer (without attentional pooling) and ModifiedResNet, "
        "timm's EfficientNet and ResNet (mean pooling, linear projection)"
    )


def _projects_the_mean(visual: Any) -> bool:
    """Whether nothing but a linear layer follows the mean over the trunk's last activations."""
    from timm.models.efficientnet import EfficientNet
    from timm.models.resnet import ResNet

    # Other trunks have layers after the pooling (MobileNetV3, ConvNeXt).
    if not isinstance(visual.trunk, EfficientNet | ResNet):
        return False
    pooled = visual.trunk.global_pool.pool_type in ("avg", "fast", "fastavg")
    linear = all(isinstance(layer, nn.Dropout | nn.Linear) for layer in visual.head)
    return pooled and linear and isinstance(visual.trunk.get_classifier(), nn.Identity)


def _block_values(visual: Any, x: Tensor) -> Tensor:
    """Local features (N, P, D) from the input (N, 1 + P, width) of the last transformer block."""
    block = visual.transformer.resblocks[-1]
    if not visual.transformer.batch_first:
        x = x.transpose(0, 1)
    x = x[:, 1:]
    width = x.shape[-1]
    weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]
    x = x + block.ls_1(block.attn.out_proj(functional.linear(block.ln_1(x), weight, bias)))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    local: Tensor = visual.ln_post(x)
    return local if visual.proj is None else local @ visual.proj


def _pool_values(pool: Any, x: Tensor) -> Tensor:
    """Local features (N, P, D) from the attention pool's input (N, width, H, W), no position."""
    local: Tensor = pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))
    return local
