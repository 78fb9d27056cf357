"""An image classifier whose weights are trained: its layers, where they start, what is kept.

The same architectures as `pipelines.backbones.classifier` reads from files. What training keeps is
a state dict by the architecture's own names, so that any code that builds the architecture can
load it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipelines.backbones.classifier import (
    Build,
    class_names,
    cropping,
    fill,
    identity,
    last_linear,
    load,
    preprocessing,
    resolve,
    rows_of,
)
from pipelines.backbones.description import BackboneConfig, Start
from pipelines.backbones.tower import BackboneKind

# The layers of `train_norm_and_last`; those of libraries are subclasses of these.
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class TrainableNetwork(nn.Module):
    """A classifier that gives penultimate activations and logits of 8-bit pixels.

    Attributes:
        trunk: normalised pixels to activations (N, D).
        linear: activations to logits (N, K).
        place: the linear layer's name in the architecture.
        projection: activations to what a contrastive loss compares (N, P), for training alone.
        only_norms: whether the trunk's normalisation layers are its only trained parts.
    """

    mean: Tensor
    std: Tensor
    projection: nn.Module | None

    def __init__(self, trunk: nn.Module, linear: nn.Linear, place: str, config: BackboneConfig):
        """Join a trunk and the layer that was taken from its `place`."""
        super().__init__()
        how = preprocessing(config)
        self.trunk, self.linear, self.place = trunk, linear, place
        self.projection = None
        self.only_norms = False
        self.register_buffer("mean", torch.tensor(how.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(how.std).view(3, 1, 1), persistent=False)

    def project(self, width: int, seed: int) -> None:
        """Add a projection D -> D -> `width`, ReLU between (SupCon: Khosla et al. 2020)."""
        dim = self.linear.in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width)
            self.projection = nn.Sequential(*layers).to(self.mean.device)

    def train_norm_and_last(self) -> None:
        """Freeze the trunk but for its normalisation layers, as stage 2 of Wang 2022 does.

        The statistics of batch normalisation still follow the batches, as in the authors' code.
        """
        self.only_norms = True
        self.trunk.requires_grad_(False)
        for layer in self._norms():
            layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> TrainableNetwork:
        """Into the mode of training or evaluation; frozen layers stay in that of evaluation."""
        super().train(mode)
        if self.only_norms:
            self.trunk.eval()  # no dropout in layers that are not trained
            for layer in self._norms():
                layer.train(mode)
        return self

    def _norms(self) -> list[nn.Module]:
        return [layer for layer in self.trunk.modules() if isinstance(layer, NORMALISATIONS)]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """8-bit RGB (N, H, W, 3) to activations (N, D), logits (N, K) and any projection (N, P).

        The projection has unit length.
        """
        # Rows of pixels are channels last already: turning the axes copies nothing.
        unit = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        features = self.trunk(unit.sub_(self.mean).div_(self.std))
        logits = self.linear(features)
        if self.projection is None:
            return features, logits
        return features, logits, functional.normalize(self.projection(features).float(), dim=1)

    def state(self) -> dict[str, Tensor]:
        """Copies of every parameter and statistic, by the architecture's own names, on the CPU."""
        trunk = dict(self.trunk.state_dict())
        layer = {f"{self.place}.{name}": v for name, v in self.linear.state_dict().items()}
        return {name: v.detach().to("cpu", copy=True) for name, v in {**trunk, **layer}.items()}


@dataclass(frozen=True)
class _Layer:
    """The last layer of a network as its file has it."""

    name: str
    class_names: tuple[str, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


def trainable(
    build: Build, config: BackboneConfig, names: Sequence[str], start: Start, seed: int
) -> TrainableNetwork:
    """The network before training, in float32 on the CPU.

    Args:
        build: the kind's own.
        config: of the backbone; resolved where `start` is "backbone".
        names: K classes, the rows of the last layer in this order.
        start: "backbone" takes the weights of its file and of its last layer the rows of these
            classes; "random" draws all of them, as the architecture's library does.
        seed: of what is drawn.

    Raises:
        UserError: where the file does not hold the architecture's weights, or lacks a class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if start == "random":
            network = build(config, len(names))
            place, linear = last_linear(network, config)
        else:
            network = build(config, len(class_names(config)))
            fill(network, config)
            place, known = last_linear(network, config)
            linear = _chosen(known, config, names)
    network.set_submodule(place, nn.Identity())
    return TrainableNetwork(network, linear, place, config)


def _chosen(known: nn.Linear, config: BackboneConfig, names: Sequence[str]) -> nn.Linear:
    """The rows of these classes, as a layer of their own."""
    weight = known.weight.detach().numpy(), known.bias.detach().numpy()
    rows = rows_of(_Layer(config.name, class_names(config), *weight), names)
    linear = nn.Linear(known.in_features, len(names))
    linear.load_state_dict(dict(zip(("weight", "bias"), map(torch.tensor, rows), strict=True)))
    return linear


def classifier_kind(build: Build, library: str | None = None) -> BackboneKind:
    """The record of a kind of image classifier.

    Args:
        build: the network of a configuration.
        library: the distribution beside torch whose version decides features.
    """
    return BackboneKind(
        resolve=functools.partial(resolve, build),
        identity=functools.partial(identity, library),
        cropping=cropping,
        load=functools.partial(load, build, library),
        code=(build, load, cropping),
        trainable=functools.partial(trainable, build),
    )
