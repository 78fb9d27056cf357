"""open_clip's models as files: their architecture, their weights, and what identifies them.

open_clip is imported by the functions that need it: with torchvision and timm it takes longer
than torch itself, and most worker processes read cached features.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pipelines.backbones.description import BackboneConfig, file_hash, missing
from pipelines.config import UserError, digest
from pipelines.data.storage import Storage

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


def resolve(
    config: BackboneConfig,
    storage: Storage,  # noqa: ARG001 - one signature for every kind
    on_progress: Callable[[int, int], None] | None = None,  # noqa: ARG001
) -> BackboneConfig:
    """The same backbone with its files named; downloads what is missing.

    Raises:
        UserError: where no weights can be found, or they do not fit the architecture's
            activation (OpenAI's weights need QuickGELU).
    """
    if (config.model is None) == (config.config is None):
        raise UserError(
            f"backbone {config.name}: give one of backbone.model=NAME and backbone.config=FILE"
        )
    architecture(config)
    _check_activation(config)
    path = config.path or _published_weights(config)
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(missing(config, f"no file {path}"))
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
        raise UserError(missing(config, f"no file {config.config}")) from None
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
        raise UserError(missing(config, "no weights named"))
    tag = _tag(config)
    cached = _cached(tag.get("hf_hub", ""))
    if cached is not None:
        return cached
    try:
        return str(download_pretrained(tag))
    except (OSError, RuntimeError, ValueError, HfHubHTTPError):
        raise UserError(
            missing(config, f"no cached weights {config.pretrained!r}, and none downloaded")
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
