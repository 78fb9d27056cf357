"""CLIP-like backbones through open_clip: found, checked, loaded, and named by content.

`resolve` runs once on the driver and turns a name into files; `load` gives the model of a
resolved configuration on any worker; `identity` says what of it decides a feature's value.
Weights come from safetensors or from `torch.load(weights_only=True)`, never from a pickle, and
never from a random generator: no file, no model.

open_clip is imported by the functions that need it: with torchvision and timm it takes longer
than torch itself, and most worker processes read cached features.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from pipelines.backbones import local
from pipelines.config import Section, UserError, digest
from pipelines.data.storage import Storage

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# What turns pixels into features besides the weights.
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "pillow")
TEXT_BATCH = 256
# open_clip's defaults (its PreprocessCfg), written down so that a backbone with a file of its own
# is told apart without importing open_clip (a second); a test compares the two.
PREPROCESSING: dict[str, Any] = {
    "size": 224,
    "mode": "RGB",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


class BackboneConfig(Section):
    """Which vision-language model: an architecture, and a file or a published tag of weights."""

    name: str = Field(description="the name in messages and tables")
    model: str | None = Field(None, description="architecture that open_clip knows by name")
    pretrained: str | None = Field(None, description="open_clip's tag of the weights")
    config: str | None = Field(None, description="JSON file of an architecture, in place of model")
    path: str | None = Field(None, description="local weights: safetensors, or a state dict")
    builtin: Literal["mini"] | None = Field(None, description="a backbone trained by the project")
    precision: Precision = Field("fp32", description="numbers of the image tower")
    about: str = Field("", description="where the weights come from; shown where they are missing")


@dataclass(frozen=True)
class Clip:
    """A frozen backbone, ready to encode.

    Attributes:
        model: open_clip's CLIP in eval mode; the text tower is always float32.
        tokenizer: texts -> tokens (K, context_length).
        crop: RGB image -> RGB image of the model's size (resize and crop, 8-bit).
        mean: channel means, for pixels in [0, 1].
        std: channel standard deviations.
        embed_dim: D, the length of a feature.
        context_length: tokens of a text.
        logit_scale: the factor from similarity to logits (already exponentiated).
        identity: what decides a feature's value; see `identity`.
        dtype: of the image tower.
        image_size: (height, width) of what `crop` gives.
    """

    model: Any  # open_clip's CLIP or CustomTextCLIP
    tokenizer: Callable[[Sequence[str]], Tensor]
    crop: Callable[[Image.Image], Image.Image]
    mean: Tensor
    std: Tensor
    embed_dim: int
    context_length: int
    logit_scale: float
    identity: Mapping[str, str]
    dtype: torch.dtype
    image_size: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def preprocess(self, image: Image.Image) -> Tensor:
        """RGB image -> normalised float32 pixels (3, H, W), as open_clip's own transform gives."""
        cropped = self.crop(image).convert("RGB")
        width, height = cropped.size
        pixels = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
        return self.normalize(pixels.reshape(1, height, width, 3))[0]

    def normalize(self, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> normalised float32 (N, 3, H, W) on the model's device."""
        return self.to_unit(pixels).sub_(self.mean).div_(self.std)

    def to_unit(self, pixels: Tensor) -> Tensor:
        """8-bit RGB (N, H, W, 3) -> float32 (N, 3, H, W) in [0, 1] on the model's device."""
        moved = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        return moved.to(torch.float32).div_(255)

    def standardize(self, unit: Tensor) -> Tensor:
        """The second half of `normalize`: (N, 3, H, W) in [0, 1] -> normalised, differentiably."""
        return (unit - self.mean) / self.std

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> image_features (N, D), float32, unit length."""
        return self.features(pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """The same as `encode_image`, in the caller's gradient mode."""
        features: Tensor = self.model.encode_image(pixels.to(self.device, self.dtype))
        return functional.normalize(features.to(torch.float32), dim=-1)

    @torch.inference_mode()
    def encode_with_local(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels -> image_features (N, D) and local ones (N, P, D), unit length."""
        pair = local.encode_with_local(self.model, pixels.to(self.device, self.dtype))
        features, patches = (functional.normalize(x.to(torch.float32), dim=-1) for x in pair)
        return features, patches

    @property
    def num_patches(self) -> int:
        """P, the number of local features of an image."""
        pixels = torch.zeros(1, 3, *self.image_size, device=self.device)
        return self.encode_with_local(pixels)[1].shape[1]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> text_features (K, D), float32, unit length; usable in a training graph."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        parts = [
            self.model.encode_text(part, normalize=True) for part in torch.split(tokens, TEXT_BATCH)
        ]
        return torch.cat(parts).to(torch.float32)


def resolve(
    config: BackboneConfig,
    storage: Storage,
    on_progress: Callable[[int, int], None] | None = None,
) -> BackboneConfig:
    """The same backbone with its files named; trains or downloads what is missing.

    Runs on the driver; calling it twice changes nothing. `on_progress` is called with (steps
    done, in all), from (0, all) on, where a backbone has to be trained.

    Raises:
        UserError: where no weights can be found, or they do not fit the architecture's
            activation (OpenAI's weights need QuickGELU).
    """
    if config.builtin == "mini" and config.path is None:
        from pipelines.backbones import mini  # here: the training code is seldom needed

        architecture, weights = mini.ensure(storage, on_progress)
        return config.model_copy(update={"config": str(architecture), "path": str(weights)})
    if (config.model is None) == (config.config is None):
        raise UserError(
            f"backbone {config.name}: give one of backbone.model=NAME and backbone.config=FILE"
        )
    _architecture(config)
    _check_activation(config)
    path = config.path or _published_weights(config)
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(_missing(config, f"no file {path}"))
    update = {"path": str(file)}
    if config.config is not None:
        update["config"] = str(Path(config.config).expanduser().resolve())
    return config.model_copy(update=update)


def identity(config: BackboneConfig) -> dict[str, str]:
    """What decides a feature's value, of a resolved configuration, without loading the model.

    The backbone's name is not in it: the same weights under another name give the same features.
    """
    if config.path is None:
        raise UserError(f"backbone {config.name}: not resolved yet")
    architecture, preprocessing = _architecture(config)
    return {
        "architecture": digest(architecture),
        "weights": file_hash(config.path),
        "preprocessing": digest(preprocessing),
        "precision": config.precision,
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def load(config: BackboneConfig, *, device: str = "cpu") -> Clip:
    """The model of a resolved configuration, frozen, in eval mode.

    Raises:
        UserError: where the weights cannot be read safely or belong to another architecture.
    """
    names = identity(config)
    architecture, preprocessing = _architecture(config)
    model = _build(config, architecture)
    _load_weights(model, config)
    model.eval().requires_grad_(False)
    scale = model.logit_scale.exp().item()
    dtype = DTYPES[config.precision]
    _reduce(model.visual, dtype)
    model.to(device)
    context_length = int(architecture["text_cfg"].get("context_length", 77))
    return Clip(
        model=model,
        tokenizer=_tokenizer(config, context_length),
        crop=cropping(config),
        mean=torch.tensor(preprocessing["mean"], device=device).view(3, 1, 1),
        std=torch.tensor(preprocessing["std"], device=device).view(3, 1, 1),
        embed_dim=int(architecture["embed_dim"]),
        context_length=context_length,
        logit_scale=scale,
        identity=names,
        dtype=dtype,
        image_size=_pair(preprocessing["size"]),
    )


def _reduce(visual: nn.Module, dtype: torch.dtype) -> None:
    """Weights in `dtype`, batch normalisation in float32: its statistics span many powers of 2."""
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    exact = [copy.deepcopy(norm.state_dict()) for norm in norms]
    visual.to(dtype)
    for norm, state in zip(norms, exact, strict=True):
        norm.float().load_state_dict(state)


def cropping(config: BackboneConfig) -> Callable[[Image.Image], Image.Image]:
    """The model's resize and crop (RGB image -> RGB image), which needs no weights."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    _, preprocessing = _architecture(config)
    transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    steps = transform.transforms[:-3]  # then: to RGB, to tensor, normalise
    return functools.partial(_apply, steps)


def file_hash(path: str) -> str:
    """The SHA-256 of a file, remembered until the file changes."""
    stat = Path(path).stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _file_hash(path: str, *_stamp: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _apply(steps: Sequence[Callable[[Any], Any]], image: Image.Image) -> Image.Image:
    for step in steps:
        image = step(image)
    return image


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _architecture(config: BackboneConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's description of the model, and its preprocessing, as plain data."""
    tag: dict[str, Any] = {}
    if config.config is not None:
        content = _read_json(config)
        architecture = content.get("model_cfg", content)
        tag = content.get("preprocess_cfg", {})
    else:
        import open_clip

        architecture = open_clip.get_model_config(config.model)
        if architecture is None:
            raise UserError(
                f"backbone {config.name}: open_clip has no model {config.model!r}; "
                "open_clip.list_models() names them, or give backbone.config=FILE"
            )
        if config.pretrained is not None:
            tag = _tag(config)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(architecture)
    if missing:
        raise UserError(f"backbone {config.name}: {config.config} lacks {', '.join(missing)}")
    known = {key: tag[key] for key in PREPROCESSING if tag.get(key) is not None}
    preprocessing = PREPROCESSING | known
    preprocessing["size"] = architecture["vision_cfg"].get("image_size", 224)
    return architecture, preprocessing


def _read_json(config: BackboneConfig) -> dict[str, Any]:
    path = Path(str(config.config)).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(_missing(config, f"no file {config.config}")) from None
    except ValueError as error:
        raise UserError(f"backbone {config.name}: {path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"backbone {config.name}: {path} is not a model description")
    return content


def _tag(config: BackboneConfig) -> dict[str, Any]:
    from open_clip import pretrained as registry

    tag = registry.get_pretrained_cfg(config.model, config.pretrained)
    if not tag:
        known = ", ".join(registry.list_pretrained_tags_by_model(config.model)) or "none"
        raise UserError(
            f"backbone {config.name}: {config.model} has no weights {config.pretrained!r}; "
            f"allowed: {known}; or give backbone.path=FILE"
        )
    return dict(tag)


def _check_activation(config: BackboneConfig) -> None:
    """Weights trained with QuickGELU lose points, silently, under the ordinary GELU."""
    import open_clip

    if config.model is None or config.pretrained is None:
        return
    trained_with = bool(_tag(config).get("quick_gelu", False))
    built_with = bool(open_clip.get_model_config(config.model).get("quick_gelu", False))
    if trained_with and not built_with:
        raise UserError(
            f"backbone {config.name}: the weights {config.pretrained!r} were trained with "
            f"QuickGELU and {config.model} has GELU; use backbone.model={config.model}-quickgelu"
        )
    if built_with and not trained_with:
        plain = config.model.removesuffix("-quickgelu")
        raise UserError(
            f"backbone {config.name}: the weights {config.pretrained!r} were trained with GELU "
            f"and {config.model} has QuickGELU; use backbone.model={plain}"
        )


def _published_weights(config: BackboneConfig) -> str:
    """The file of a tag: from the local cache, else downloaded by open_clip."""
    from huggingface_hub.errors import HfHubHTTPError
    from open_clip.pretrained import download_pretrained

    if config.pretrained is None:
        raise UserError(_missing(config, "no weights named"))
    tag = _tag(config)
    cached = _cached(tag.get("hf_hub", ""))
    if cached is not None:
        return cached
    try:
        return str(download_pretrained(tag))
    except (OSError, RuntimeError, ValueError, HfHubHTTPError):
        raise UserError(
            _missing(config, f"no cached weights {config.pretrained!r}, and none downloaded")
        ) from None


def _cached(hub: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, name = hub.rpartition("/")
    if not repository:
        return None
    for file in [name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return found
    return None


def _missing(config: BackboneConfig, what: str) -> str:
    files = "backbone.path=FILE" + (" backbone.config=FILE" if config.config else "")
    about = f" ({config.about})" if config.about else ""
    return f"backbone {config.name}: {what}; give local weights by {files}{about}"


def _build(config: BackboneConfig, architecture: dict[str, Any]) -> Any:
    """The architecture with its weights still to come: nothing is fetched for its towers."""
    import open_clip

    arguments = json.loads(json.dumps(architecture))
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


def _tokenizer(config: BackboneConfig, context_length: int) -> Callable[[Sequence[str]], Tensor]:
    import open_clip

    if config.config is not None:
        return open_clip.SimpleTokenizer(context_length=context_length)  # type: ignore[no-any-return]
    try:
        return open_clip.get_tokenizer(config.model)  # type: ignore[no-any-return]
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone {config.name}: no tokenizer ({error})") from None
