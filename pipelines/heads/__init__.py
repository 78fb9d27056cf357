"""Heads: how image features become similarities; one file a head, found by listing.

A file NAME.py here is a head where it ends in `PLUGIN = HeadPlugin(...)`: its `Config` (a
`HeadConfig` with `name: Literal["NAME"]`), `build(config, context, seed)`, which gives a `Head`,
and `similarity(arrays, settings, features)`, the rule of its `Predictor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.backbones.plugins import discover, tagged_union
from pipelines.heads.base import (
    Head,
    HeadConfig,
    HeadContext,
    HeadOutput,
    HeadPlugin,
    Predictor,
)
from pipelines.ood.table import Table

HEADS: Table[HeadPlugin[Any]] = discover(__name__, list(__path__), HeadPlugin)

if TYPE_CHECKING:
    AnyHead = HeadConfig
else:
    AnyHead = tagged_union(HEADS)

__all__ = [
    "HEADS",
    "AnyHead",
    "Head",
    "HeadConfig",
    "HeadContext",
    "HeadOutput",
    "HeadPlugin",
    "Predictor",
]


def build(config: HeadConfig, context: HeadContext, seed: int) -> Any:
    """The head that `config` names: an `nn.Module` that follows `Head`."""
    return HEADS[config.name].build(config, context, seed)
