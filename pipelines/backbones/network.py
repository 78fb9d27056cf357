"""The frozen network of a configuration, whatever its kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipelines.backbones import precision
from pipelines.backbones.description import BackboneConfig, Start, file_hash
from pipelines.backbones.tower import BackboneKind, Crop, OnProgress, Tower
from pipelines.config import UserError
from pipelines.data.storage import Storage

if TYPE_CHECKING:
    from pipelines.backbones.trainable import TrainableNetwork

__all__ = ["code", "file_hash", "has_text", "identity", "load", "resolve"]


def _kind(config: BackboneConfig) -> BackboneKind:
    """Only that kind is imported: each brings a library of its own."""
    plugin = importlib.import_module(f"pipelines.backbones.kinds.{config.kind}").PLUGIN
    assert isinstance(plugin, BackboneKind), config.kind
    return plugin


def code(config: BackboneConfig) -> tuple[Callable[..., object], ...]:
    """The functions of its kind that decide a feature, for the digest of the code."""
    return _kind(config).code


def has_text(config: BackboneConfig) -> bool:
    """Whether the backbone encodes texts; else it is an image classifier."""
    return _kind(config).has_text


def resolve(
    config: BackboneConfig,
    storage: Storage,
    on_progress: OnProgress | None = None,
    *,
    device: str = "cpu",
) -> BackboneConfig:
    """The same backbone with its files and precision named; trains or downloads what is missing.

    Runs on the driver; calling it twice changes nothing. `on_progress` is called with (steps
    done, in all), from (0, all) on, where a backbone has to be trained. `device` is where the
    tower will run, for `precision=auto`.

    Raises:
        UserError: where no weights can be found, or they do not fit the architecture's
            activation (OpenAI's weights need QuickGELU); see `pipelines.backbones.precision`.
    """
    return precision.settle(_kind(config).resolve(config, storage, on_progress), device)


def identity(config: BackboneConfig) -> dict[str, str]:
    """What decides a feature's value, of a resolved configuration, without loading the model.

    The backbone's name is not in it: the same weights under another name give the same features.
    """
    return _kind(config).identity(config)


def cropping(config: BackboneConfig) -> Crop:
    """The model's resize and crop (RGB image -> RGB image), which needs no weights."""
    return _kind(config).cropping(config)


def trainable(
    config: BackboneConfig, names: Sequence[str], start: Start, seed: int
) -> TrainableNetwork:
    """The network of a configuration before training, see `pipelines.backbones.trainable`.

    Raises:
        UserError: where its kind is not trained end to end, or its file does not fit.
    """
    make = _kind(config).trainable
    if make is None:
        raise UserError(
            f"backbone {config.name}: kind={config.kind} is not trained end to end; image "
            "classifiers are (kind=cifar, timm, torchvision)"
        )
    return make(config, names, start, seed)


def load(config: BackboneConfig, *, device: str = "cpu") -> Tower:
    """The model of a resolved configuration, frozen, in eval mode.

    Raises:
        UserError: where the weights cannot be read safely or belong to another architecture.
    """
    return _kind(config).load(config, device)
