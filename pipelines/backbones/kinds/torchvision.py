"""Image classifiers of torchvision by their names there, such as `resnet50`."""

from __future__ import annotations

from torch import nn

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.trainable import classifier_kind
from pipelines.config import UserError


def build(config: BackboneConfig, num_classes: int) -> nn.Module:
    """The network of that name, with weights still to come.

    Raises:
        UserError: where torchvision has none of that name.
    """
    from torchvision import models  # takes a second: only where one is loaded

    known = models.list_models(module=models)
    if config.model not in known:
        raise UserError(
            f"backbone {config.name}: torchvision has no network {config.model!r}; allowed: "
            f"{', '.join(known)}"
        )
    network: nn.Module = models.get_model(config.model, weights=None, num_classes=num_classes)
    return network


PLUGIN = classifier_kind(build, library="torchvision")
