"""Image classifiers of timm by their names there, such as `tf_efficientnet_lite0`."""

from __future__ import annotations

from torch import nn

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.trainable import classifier_kind
from pipelines.config import UserError


def build(config: BackboneConfig, num_classes: int) -> nn.Module:
    """The network of that name, with weights still to come.

    Raises:
        UserError: where timm has none of that name.
    """
    import timm  # takes a second: only where one is loaded

    name = str(config.model)
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise UserError(
            f"backbone {config.name}: timm has no network {name!r}; timm.list_models() names them"
            + (f" (near: {near})" if near else "")
        )
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    return network


PLUGIN = classifier_kind(build, library="timm")
