"""Image classifiers as frozen backbones: a network, its last linear layer, and its classes.

Features are the penultimate activations as they leave the network, not normalised; logits are
W h + b of the last layer. A kind of classifier gives a function that builds the network with its
weights still to come; the weights come from a local file that is safe to read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from pipelines.backbones.description import BackboneConfig, Preprocessing, file_hash, missing
from pipelines.backbones.tower import (
    DTYPES,
    Crop,
    OnProgress,
    Tower,
    apply_steps,
    reduce_precision,
)
from pipelines.config import UserError, digest
from pipelines.data.storage import Storage
from pipelines.data.stored_lists import read_list

# (config, K) to the network: pixels to logits, which the last `nn.Linear` of it gives.
Build: TypeAlias = Callable[[BackboneConfig, int], nn.Module]
# What state dicts are wrapped in, and what parallel training puts before names.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PARALLEL = "module."


class KnownClasses(Protocol):
    """A linear layer W (K, D), b (K,) and the names of its rows."""

    @property
    def name(self) -> str:
        """Of the backbone, for messages."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""

    @property
    def weight(self) -> NDArray[np.float32]:
        """W."""

    @property
    def bias(self) -> NDArray[np.float32]:
        """The layer's b."""


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(Tower):
    """A frozen image classifier.

    Attributes:
        network: pixels to penultimate activations; its last layer is taken off.
        weight: W (K, D) of that layer, float32.
        bias: b (K,).
        class_names: K names, one a row of W.
        places: the layers that `layers` gives, and their channels.
    """

    network: nn.Module
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    class_names: tuple[str, ...]
    places: Mapping[str, int] = field(default_factory=dict)

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> penultimate activations (N, D), float32."""
        ready = pixels.to(self.device, self.dtype, memory_format=torch.channels_last)
        features: Tensor = self.network(ready)
        return features.to(torch.float32)

    @torch.inference_mode()
    def layers(self, pixels: Tensor) -> Tensor:
        """Mean activations over all places of an image, (N, W), layer after layer, float32."""
        if not self.places:
            return super().layers(pixels)
        seen = _outputs(self.network, self.places, lambda: self.features(pixels))
        means = [seen[name].to(torch.float32).mean(dim=(2, 3)) for name in self.places]
        return torch.cat(means, dim=1)


def _outputs(
    network: nn.Module, places: Iterable[str], run: Callable[[], object]
) -> dict[str, Tensor]:
    """What the network's modules at these places give while `run` calls the network."""
    seen: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name in places
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def resolve(
    build: Build,
    config: BackboneConfig,
    storage: Storage,  # noqa: ARG001 - one signature for every kind
    on_progress: OnProgress | None = None,  # noqa: ARG001
) -> BackboneConfig:
    """The same backbone with its weights and its class names in full.

    Raises:
        UserError: for what is missing: the network's name, its classes, preprocessing or weights.
    """
    needed = {
        "model": config.model,
        # Without weights the last layer is that of the benchmark's classes.
        "class_names": config.class_names or config.untrained,
        "preprocessing": config.preprocessing,
    }
    if absent := [f"backbone.{key}=" for key, value in needed.items() if not value]:
        raise UserError(f"backbone {config.name}: kind={config.kind} needs {', '.join(absent)} too")
    names = class_names(config)
    with torch.device("meta"):  # a wrong name is said before a file is looked for
        build(config, max(1, len(names)))
    if config.untrained:
        return config.model_copy(update={"path": None, "class_names": list(names)})
    if config.path is None:
        raise UserError(missing(config, "no weights named"))
    file = Path(config.path).expanduser().resolve()
    if not file.is_file():
        raise UserError(missing(config, f"no file {config.path}"))
    return config.model_copy(update={"path": str(file), "class_names": list(names)})


def class_names(config: BackboneConfig) -> tuple[str, ...]:
    """The classes of the last layer, in its order.

    Raises:
        UserError: where the file of names cannot be read, or a name stands there twice.
    """
    given = config.class_names
    if isinstance(given, str):
        is_reference = "#" in given
        given = read_list(given) if is_reference else _names_in(config, Path(given).expanduser())
    names = tuple(given or ())
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"backbone {config.name}: class {twice[0]!r} stands twice in class_names")
    return names


def _names_in(config: BackboneConfig, path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"backbone {config.name}: class_names={path} ({error})") from None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"backbone {config.name}: class_names={path} is no list of names")
    return [name.strip() for name in listed if name.strip()]


def identity(library: str | None, config: BackboneConfig) -> dict[str, str]:
    """What decides a feature's value, of a resolved configuration."""
    if config.path is None and not config.untrained:
        raise UserError(f"backbone {config.name}: not resolved yet")
    libraries = ["torch", "torchvision", "pillow", *([library] if library else [])]
    return {
        "architecture": digest([config.kind, config.model, sorted(config.rename.items())]),
        "weights": "none" if config.untrained else file_hash(str(config.path)),
        "preprocessing": digest(preprocessing(config).model_dump(mode="json")),
        "precision": config.precision,
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def preprocessing(config: BackboneConfig) -> Preprocessing:
    """How an image becomes the network's pixels.

    Raises:
        UserError: where the configuration does not say it.
    """
    if config.preprocessing is None:
        raise UserError(f"backbone {config.name}: not resolved yet")
    return config.preprocessing


def cropping(config: BackboneConfig) -> Crop:
    """Resize of the short side and centre crop, RGB to RGB."""
    from torchvision import transforms

    how = preprocessing(config)
    mode = transforms.InterpolationMode(how.interpolation)
    steps = [transforms.Resize(how.resize or how.size, mode), transforms.CenterCrop(how.size)]
    return functools.partial(apply_steps, steps)


def load(
    build: Build, library: str | None, config: BackboneConfig, device: str = "cpu"
) -> ImageClassifier:
    """The classifier of a resolved configuration, frozen, in eval mode.

    Raises:
        UserError: where the weights cannot be read safely or belong to another architecture.
    """
    names, how, dtype = class_names(config), preprocessing(config), DTYPES[config.precision]
    network = build(config, len(names))
    fill(network, config)
    network.eval().requires_grad_(False)
    place, layer = last_linear(network, config)
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    network.set_submodule(place, nn.Identity())
    _check_layers(network, config, how.size)
    reduce_precision(network, dtype)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ImageClassifier(
        name=config.name,
        crop=cropping(config),
        mean=torch.tensor(how.mean, device=device).view(3, 1, 1),
        std=torch.tensor(how.std, device=device).view(3, 1, 1),
        embed_dim=weight.shape[1],
        logit_scale=1.0,
        identity=identity(library, config),
        dtype=dtype,
        image_size=(how.size, how.size),
        network=network,
        weight=weight,
        bias=bias,
        class_names=names,
        places=config.layers,
    )


def _check_layers(network: nn.Module, config: BackboneConfig, size: int) -> None:
    """Refuse layers that the network has not, or that give other channels than is said."""
    known = dict(network.named_modules())
    word = f"backbone {config.name}: backbone.layers"
    if absent := [name for name in config.layers if name not in known]:
        raise UserError(
            f"{word}: no place {absent[0]!r} in {config.model}; there are "
            f"{', '.join(name for name in known if name and '.' not in name)} and what is in them"
        )
    if not config.layers:
        return
    with torch.no_grad():
        seen = _outputs(network, config.layers, lambda: network(torch.zeros(1, 3, size, size)))
    for name, channels in config.layers.items():
        shape = seen[name].shape
        if len(shape) != 4 or shape[1] != channels:
            raise UserError(
                f"{word}: {name} gives {tuple(shape)[1:]} an image, not ({channels}, H, W)"
            )


def last_linear(network: nn.Module, config: BackboneConfig) -> tuple[str, nn.Linear]:
    """The layer that gives the logits, and its place in the network."""
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not layers or layers[-1][1].bias is None:
        raise UserError(
            f"backbone {config.name}: {config.kind} {config.model} does not end in a linear layer "
            "with a bias; scores need its logits"
        )
    return layers[-1]


def fill(network: nn.Module, config: BackboneConfig) -> None:
    """Give the network every parameter of the file, or raise a UserError."""
    state = {_renamed(name, config): value for name, value in _read(config).items()}
    wanted = network.state_dict()
    # Older files do not count batches, which matters to training alone.
    state |= {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    problems = [f"lacks {name}" for name in wanted if name not in state]
    problems += [f"has {name}, which the network has not" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise UserError(
            f"backbone {config.name}: {config.path} does not hold the weights of "
            f"{config.kind} {config.model} with {len(class_names(config))} classes "
            f"({'; '.join(problems[:3])}); backbone.rename maps names of parameters"
        )
    network.load_state_dict(state)


def _renamed(name: str, config: BackboneConfig) -> str:
    for pattern, becomes in config.rename.items():
        name = re.sub(pattern, becomes, name)
    return name


def _read(config: BackboneConfig) -> dict[str, Tensor]:
    """The parameters in the file, by the names they have there.

    Raises:
        UserError: where it is no safetensors file and no plain state dict.
    """
    if config.untrained:
        raise UserError(
            f"backbone {config.name}: untrained=true says that it has no weights; a method that "
            "trains a network from scratch gives it some"
        )
    path = str(config.path)
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"backbone {config.name}: {path} holds objects, not only weights; give safetensors "
            f"({str(error).splitlines()[0]})"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"backbone {config.name}: {path} holds no weights ({reason})") from None
    return _unwrapped(content, config)


def _unwrapped(content: object, config: BackboneConfig) -> dict[str, Tensor]:
    """A state dict out of what is often around it."""
    while isinstance(content, dict) and (keys := [k for k in WRAPPERS if k in content]):
        content = content[keys[0]]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"backbone {config.name}: {config.path} holds no state dict")
    return {str(name).removeprefix(PARALLEL): value for name, value in content.items()}


def rows_of(model: KnownClasses, names: Sequence[str]) -> tuple[NDArray[np.float32], ...]:
    """W and b of these classes, in their order.

    Raises:
        UserError: where the classifier does not know one of them.
    """
    places = {name: row for row, name in enumerate(model.class_names)}
    unknown = [name for name in names if name not in places]
    if unknown:
        raise UserError(unknown_classes(model.name, unknown, model.class_names))
    rows = [places[name] for name in names]
    return model.weight[rows], model.bias[rows]


def unknown_classes(backbone: str, unknown: Sequence[str], known: Sequence[str]) -> str:
    """What to say where a benchmark has classes that a classifier was not trained on."""
    return (
        f"backbone {backbone}: its classifier has no class {', '.join(map(repr, unknown[:3]))}"
        f" ({len(unknown)} unknown); it has {len(known)}: {', '.join(known[:5])}, ..."
    )
