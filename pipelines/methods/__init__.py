"""Methods: which head is trained with which losses and judged by which score, one file each.

A file NAME.py here is a method when it defines `Config` (a `MethodConfig` with `name:
Literal["NAME"]`) and `loss(outputs, batch, config) -> (losses by name, report)`. It may define
`prepare(config, initial) -> tensors by name`, which runs once before training. The loop in
`pipelines.finetune.loop` never changes for a new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.backbones.plugins import discover, tagged_union
from pipelines.methods.base import MethodConfig, training_setting

METHODS = discover(__name__, list(__path__))

if TYPE_CHECKING:
    AnyMethod = MethodConfig
else:
    AnyMethod = tagged_union(METHODS)

__all__ = ["METHODS", "AnyMethod", "MethodConfig", "training_setting"]
