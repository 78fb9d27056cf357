"""Which backbone: its configuration, its files, and what of them decides a feature's value.

`resolve` runs once on the driver and turns a name into files; `identity` says what of a resolved
configuration decides a feature, without loading the model (`pipelines.backbones.clip` does that).
There are no random weights: no file, no model.

open_clip is imported by the functions that need it: with torchvision and timm it takes longer
than torch itself, and most worker processes read cached features.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from pipelines.config import Section, UserError, digest
from pipelines.data.storage import Storage

Precision = Literal["fp32", "bf16", "fp16"]
# What turns pixels into features besides the weights.
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "pillow")
# Plain data in open_clip's words.
Description: TypeAlias = dict[str, Any]
# open_clip's defaults (its PreprocessCfg), written down so that a backbone that is described by a
# file is identified without importing open_clip (a second); a test compares the two.
PREPROCESSING: Description = {
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

        described, weights = mini.ensure(storage, on_progress)
        return config.model_copy(update={"config": str(described), "path": str(weights)})
    if (config.model is None) == (config.config is None):
        raise UserError(
            f"backbone {config.name}: give one of backbone.model=NAME and backbone.config=FILE"
        )
    architecture(config)
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
    described = architecture(config)
    return {
        "architecture": digest(described.model),
        "weights": file_hash(config.path),
        "preprocessing": digest(described.preprocessing),
        "precision": config.precision,
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def file_hash(path: str) -> str:
    """The SHA-256 of a file, remembered until the file changes."""
    stat = Path(path).stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _file_hash(path: str, *_stamp: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Architecture:
    """open_clip's description of a model, and its preprocessing, as plain data."""

    model: Description
    preprocessing: Description


def architecture(config: BackboneConfig) -> Architecture:
    """What open_clip, or the configuration's file, says of the model.

    Raises:
        UserError: for an unknown name, or a file that describes no model.
    """
    tag: Description = {}
    if config.config is not None:
        content = _read_json(config)
        model = content.get("model_cfg", content)
        tag = content.get("preprocess_cfg", {})
    else:
        import open_clip

        model = open_clip.get_model_config(config.model)
        if model is None:
            raise UserError(
                f"backbone {config.name}: open_clip has no model {config.model!r}; "
                "open_clip.list_models() names them, or give backbone.config=FILE"
            )
        if config.pretrained is not None:
            tag = _tag(config)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(model)
    if missing:
        raise UserError(f"backbone {config.name}: {config.config} lacks {', '.join(missing)}")
    known = {key: tag[key] for key in PREPROCESSING if tag.get(key) is not None}
    preprocessing = PREPROCESSING | known
    preprocessing["size"] = model["vision_cfg"].get("image_size", 224)
    return Architecture(model, preprocessing)


def _read_json(config: BackboneConfig) -> Description:
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


def _tag(config: BackboneConfig) -> Description:
    """What open_clip knows of published weights."""
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
        path = try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return path
    return None


def _missing(config: BackboneConfig, what: str) -> str:
    files = "backbone.path=FILE" + (" backbone.config=FILE" if config.config else "")
    about = f" ({config.about})" if config.about else ""
    return f"backbone {config.name}: {what}; give local weights by {files}{about}"
