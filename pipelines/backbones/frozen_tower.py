"""A text tower as named arrays, for a head whose prompts still need it when it judges.

CoCoOp's prompts depend on the image, so its predictor carries the tower's blocks: they are
written by `to_arrays` beside the head and put together again by `from_arrays`, without open_clip
and without the backbone's files. `pipelines.backbones.text_tower.encode_shared` runs either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.backbones.text_tower import TextTower, is_standard
from pipelines.config import UserError
from pipelines.records import Record

PREFIX = "tower."


def check(tower: TextTower) -> None:
    """Refuse a tower that `to_arrays` could not describe.

    Raises:
        UserError: where its blocks are not CLIP's usual ones.
    """
    known = is_standard(tower) and isinstance(tower.ln_final, nn.LayerNorm)
    if not known or any(_activation(block) is None for block in tower.blocks):
        raise UserError(
            "this backbone's text tower has blocks of an unusual kind, which a head that judges by "
            "prompts of its own for each image (cocoop) cannot keep; choose head=coop"
        )


class TowerSettings(Record):
    """What beside its weights decides a tower's result; the activation by a name of ours."""

    layers: int
    heads: int
    activation: str
    eps: float


def to_arrays(
    tower: TextTower, length: int
) -> tuple[dict[str, NDArray[np.float32]], TowerSettings]:
    """The tower's weights and what else decides its result.

    Args:
        tower: `check` has accepted it.
        length: positions that prompts take at most.

    Returns:
        (float32 arrays by name, each beginning with `tower.`; its settings).
    """
    tensors = {"positions": tower.positional_embedding[:length]}
    tensors.update({f"ln_final.{n}": t for n, t in tower.ln_final.state_dict().items()})
    for number, block in enumerate(tower.blocks):
        tensors.update({f"{number}.{n}": t for n, t in block.state_dict().items()})
    if isinstance(tower.projection, nn.Linear):
        tensors["projection"] = tower.projection.weight.T
        if tower.projection.bias is not None:
            tensors["projection_bias"] = tower.projection.bias
    elif isinstance(tower.projection, Tensor):
        tensors["projection"] = tower.projection
    arrays = {
        PREFIX + name: tensor.detach().float().cpu().numpy().copy()
        for name, tensor in tensors.items()
    }
    activation = _activation(tower.blocks[0])
    assert activation is not None  # `check`
    settings = TowerSettings(
        layers=len(tower.blocks),
        heads=int(tower.blocks[0].attn.num_heads),  # type: ignore[union-attr, arg-type]
        activation=activation,
        eps=float(tower.ln_final.eps),  # type: ignore[arg-type]
    )
    return arrays, settings


def from_arrays(arrays: Mapping[str, NDArray[np.float64]], settings: TowerSettings) -> TextTower:
    """The tower of `to_arrays`, in float64; the arrays' memory is used, not copied."""
    tensors = {
        name.removeprefix(PREFIX): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(PREFIX)
    }
    width = tensors["positions"].shape[1]
    with torch.device("meta"):
        blocks = [_Block(width, tensors, n, settings) for n in range(settings.layers)]
        ln_final = nn.LayerNorm(width, eps=settings.eps)
        nothing = nn.Embedding(1, width)
    for number, block in enumerate(blocks):
        _load(block, tensors, f"{number}.")
    _load(ln_final, tensors, "ln_final.")
    return TextTower(
        token_embedding=nothing,
        positional_embedding=tensors["positions"],
        blocks=tuple(blocks),
        ln_final=ln_final,
        projection=_projection(tensors),
        pool="argmax",
        end_id=None,
        context_length=len(tensors["positions"]),
    )


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    """The parts of a block that `encode_shared` uses, named as open_clip names them."""

    def __init__(
        self, width: int, tensors: Mapping[str, Tensor], number: int, settings: TowerSettings
    ) -> None:
        super().__init__()
        hidden = len(tensors[f"{number}.mlp.c_fc.bias"])
        scaled = f"{number}.ls_1.gamma" in tensors
        self.ln_1 = nn.LayerNorm(width, eps=settings.eps)
        self.attn = nn.MultiheadAttention(width, settings.heads, batch_first=True)
        self.ls_1 = _Scale(width) if scaled else nn.Identity()
        self.ln_2 = nn.LayerNorm(width, eps=settings.eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", _ACTIVATIONS[settings.activation]())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))
        self.ls_2 = _Scale(width) if scaled else nn.Identity()


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": _QuickGELU,
}


def _activation(block: Any) -> str | None:
    """The name of a block's activation, or None where it is none of those known."""
    layer = block.mlp.gelu
    if isinstance(layer, nn.GELU):
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    return "quick_gelu" if type(layer).__name__ == "QuickGELU" else None


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


def _projection(tensors: Mapping[str, Tensor]) -> nn.Module | Tensor | None:
    if "projection" not in tensors or "projection_bias" not in tensors:
        return tensors.get("projection")
    weight, bias = tensors["projection"].T, tensors["projection_bias"]
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return linear.requires_grad_(False)
