"""A small open_clip model with random weights, and features to train heads on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP

from pipelines.finetune.loop import TrainingData

CLASS_NAMES = ("zero", "one dog", "two red cats", "three")


@dataclass(frozen=True)
class SmallClip:
    model: Any
    tokenizer: Any
    embed_dim: int
    context_length: int
    logit_scale: float
    name: str = "small"

    @property
    def device(self):
        return next(self.model.parameters()).device

    def encode_text(self, texts):
        with torch.no_grad():
            return F.normalize(self.model.encode_text(self.tokenizer(list(texts))), dim=-1)


@dataclass(frozen=True)
class SmallClassifier:
    """An image classifier whose activations are the toy features."""

    weight: Any
    bias: Any
    class_names: tuple[str, ...]
    embed_dim: int
    logit_scale: float = 1.0
    name: str = "small classifier"

    @property
    def device(self):
        return torch.device("cpu")


def small_backbone(head):
    """What a head of that configuration is built from: texts, or a classifier's layer."""
    if "classifier" not in head.needs:
        return small_clip()
    random = np.random.default_rng(3)
    weight = random.normal(size=(len(CLASS_NAMES), 16)).astype(np.float32)
    bias = random.normal(size=len(CLASS_NAMES)).astype(np.float32)
    return SmallClassifier(weight, bias, CLASS_NAMES, 16)


def vision_config():
    return {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}


def text_config(*, width: int = 32, layers: int = 2, length: int = 24):
    return {
        "context_length": length,
        "vocab_size": 49408,
        "width": width,
        "heads": 4,
        "layers": layers,
    }


def small_clip(seed: int = 0, *, width: int = 32, layers: int = 2, length: int = 24, **text):
    config = {**text_config(width=width, layers=layers, length=length), **text}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(embed_dim=16, vision_cfg=vision_config(), text_cfg=config)
        # Weights of a size that makes attention and MLP matter, unlike the tiny initial ones.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(1.0 + parameter.numel() ** 0.05)
    model.eval().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    return SmallClip(model, tokenizer, 16, length, 10.0)


def toy_data(seed: int = 0, *, per_class: int = 24, outliers: int = 40) -> TrainingData:
    """Unit features in noisy clusters around one direction a class."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(CLASS_NAMES) + 1, 16))

    def draw(label, count):
        rows = centres[label] + 0.7 * rng.normal(size=(count, 16))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def split(count):
        labels = np.repeat(np.arange(len(CLASS_NAMES)), count)
        return np.concatenate([draw(k, count) for k in range(len(CLASS_NAMES))]), labels

    def local(features):
        """(N, 3, 16): an image's own direction, half of it, and another."""
        noise = rng.normal(size=(len(features), 3, 16))
        rows = features[:, None] * np.array([1.0, 0.5, 0.0])[:, None] + 0.3 * noise
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        return {"local_features": rows.astype(np.float32)}

    features, labels = split(per_class)
    validation_features, validation_labels = split(8)
    auxiliary = draw(len(CLASS_NAMES), outliers)
    domains = {"domains": np.arange(len(labels)) % 3}
    return TrainingData(
        class_names=CLASS_NAMES,
        templates=("a photo of a {}.", "a picture of a {}."),
        features=features,
        labels=labels,
        validation_features=validation_features,
        validation_labels=validation_labels,
        outliers=auxiliary,
        address=f"toy-{seed}-{per_class}-{outliers}",
        columns={**local(features), **domains},
        validation_columns=local(validation_features),
        outlier_columns=local(auxiliary),
    )
