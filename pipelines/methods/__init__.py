"""Methods: which head is trained with which losses; one file a method, found by listing.

A file NAME.py here is a method where it ends in `PLUGIN = MethodPlugin(...)`: its `Config` (a
`MethodConfig` with `name: Literal["NAME"]`), `loss(outputs, batch, config)`, which gives losses by
name and a report, and perhaps `prepare(config, initial)`, which runs once before training. The
loop in `pipelines.finetune.loop` never changes for a new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.backbones.plugins import discover, tagged_union
from pipelines.methods.base import MethodConfig, MethodPlugin, training_setting
from pipelines.ood.table import Table

METHODS: Table[MethodPlugin[Any]] = discover(__name__, list(__path__), MethodPlugin)

if TYPE_CHECKING:
    AnyMethod = MethodConfig
else:
    AnyMethod = tagged_union(METHODS)

__all__ = ["METHODS", "AnyMethod", "MethodConfig", "MethodPlugin", "training_setting"]
