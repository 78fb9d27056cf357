"""CLIP-like backbones through open_clip: loaded from files that are safe to read, ready to encode.

`load` gives the model of a resolved configuration on any worker. Weights come from safetensors or
from `torch.load(weights_only=True)`, never from a pickle.
"""

from __future__ import annotations

import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from pipelines.backbones import local
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.open_clip_files import Architecture, architecture, identity
from pipelines.backbones.tower import DTYPES, Crop, Tower, apply_steps, reduce_precision
from pipelines.config import UserError

TEXT_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Clip(Tower):
    """A frozen vision-language model, ready to encode; its features have unit length.

    Attributes:
        model: open_clip's CLIP in eval mode; the text tower is always float32.
        tokenizer: texts -> tokens (K, context_length).
        context_length: tokens of a text.
    """

    model: Any  # open_clip's CLIP or CustomTextCLIP
    tokenizer: Callable[[Sequence[str]], Tensor]
    context_length: int

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> image_features (N, D), float32, unit length."""
        features: Tensor = self.model.encode_image(self._ready(pixels))
        return functional.normalize(features.to(torch.float32), dim=-1)

    @torch.inference_mode()
    def encode_with_local(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels -> image_features (N, D) and local ones (N, P, D), unit length."""
        pair = local.encode_with_local(self.model, self._ready(pixels))
        features, each = (functional.normalize(x.to(torch.float32), dim=-1) for x in pair)
        return features, each

    def _ready(self, pixels: Tensor) -> Tensor:
        # Convolutions are faster channels last (`suite=towers`); a transformer does not mind.
        return pixels.to(self.device, self.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> text_features (K, D), float32, unit length; usable in a training graph."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        parts = [
            self.model.encode_text(part, normalize=True) for part in torch.split(tokens, TEXT_BATCH)
        ]
        return torch.cat(parts).to(torch.float32)


def load(config: BackboneConfig, device: str = "cpu") -> Clip:
    """The model of a resolved configuration, frozen, in eval mode.

    Raises:
        UserError: where the weights cannot be read safely or belong to another architecture.
    """
    names = identity(config)
    described = architecture(config)
    model = _build(config, described)
    _load_weights(model, config)
    model.eval().requires_grad_(False)
    scale = model.logit_scale.exp().item()
    dtype = DTYPES[config.precision]
    reduce_precision(model.visual, dtype)
    model.to(device)
    model.visual.to(memory_format=torch.channels_last)
    length = context_length(described)
    return Clip(
        name=config.name,
        model=model,
        tokenizer=_tokenizer(config, length),
        crop=cropping(config),
        mean=torch.tensor(described.preprocessing["mean"], device=device).view(3, 1, 1),
        std=torch.tensor(described.preprocessing["std"], device=device).view(3, 1, 1),
        embed_dim=int(described.model["embed_dim"]),
        context_length=length,
        logit_scale=scale,
        identity=names,
        dtype=dtype,
        image_size=_pair(described.preprocessing["size"]),
    )


def cropping(config: BackboneConfig) -> Crop:
    """The model's resize and crop (RGB image -> RGB image), which needs no weights."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocessing = architecture(config).preprocessing
    transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    steps = transform.transforms[:-3]  # then: to RGB, to tensor, normalise
    return functools.partial(apply_steps, steps)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _build(config: BackboneConfig, described: Architecture) -> Any:
    """The architecture with its weights still to come: nothing is fetched for its towers."""
    import open_clip

    arguments = json.loads(json.dumps(described.model))
    custom = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    if "multimodal_cfg" in arguments:
        raise UserError(f"backbone {config.name}: a captioning model (CoCa) is not supported")
    if "timm_model_name" in arguments["vision_cfg"]:
        arguments["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in arguments["text_cfg"]:
        arguments["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        return kind(**arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"backbone {config.name}: not buildable ({error})") from None


def _load_weights(model: nn.Module, config: BackboneConfig) -> None:
    """Every parameter from the file, or an error.

    Raises:
        UserError: for TorchScript archives and pickles of objects, which can run code, and for
            files that lack a parameter or have another shape.
    """
    import open_clip

    path = str(config.path)
    if _is_torchscript(path):
        raise UserError(
            f"backbone {config.name}: {path} is a TorchScript archive, which holds code; give "
            "the same weights as safetensors or as a plain state dict"
        )
    try:
        open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"backbone {config.name}: {path} holds objects, not only weights; give safetensors "
            f"({str(error).splitlines()[0]})"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        detail = " ".join(line.strip() for line in lines[:3])[:300]
        raise UserError(
            f"backbone {config.name}: {path} does not hold the weights of "
            f"{config.model or config.config} ({detail})"
        ) from None


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tokenizer(config: BackboneConfig) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> tokens (K, context_length), which needs no weights.

    Raises:
        UserError: where there is none.
    """
    return _tokenizer(config, context_length(architecture(config)))


def context_length(described: Architecture) -> int:
    """How many tokens of a text the model reads."""
    return int(described.model["text_cfg"].get("context_length", 77))


def _tokenizer(config: BackboneConfig, context_length: int) -> Callable[[Sequence[str]], Tensor]:
    import open_clip

    if config.config is not None:
        return open_clip.SimpleTokenizer(context_length=context_length)  # type: ignore[no-any-return]
    try:
        return open_clip.get_tokenizer(config.model)  # type: ignore[no-any-return]
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone {config.name}: no tokenizer ({error})") from None
