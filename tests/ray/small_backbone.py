"""The small random backbone as files, as `resolve` names a backbone."""

import json

import safetensors.torch

from pipelines.backbones.description import BackboneConfig
from tests.small_clip import small_clip, text_config, vision_config


def write_backbone(folder):
    description = {"embed_dim": 16, "vision_cfg": vision_config(), "text_cfg": text_config()}
    (folder / "small.json").write_text(json.dumps(description))
    weights = {k: v.contiguous() for k, v in small_clip().model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "small.safetensors")
    return BackboneConfig(
        name="small", config=str(folder / "small.json"), path=str(folder / "small.safetensors")
    )


def files(storage, head):
    """The content of a trained head's files."""
    names = ("head.json", "head.safetensors")
    parts = [(which, name) for which in ("best", "last") for name in names]
    return [storage.read_bytes("cache", "heads", head, *part) for part in parts]
