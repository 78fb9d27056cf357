"""A ResNet-20 of seeded weights on six digits, as the words of a run that trains it."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from pipelines.backbones.kinds import cifar

NAMES = ("zero", "one", "two", "three", "four", "five")


def write_network(folder: Path) -> str:
    """Write the weights and the backbone's file; the word that names it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = cifar.NETWORKS["resnet20"](len(NAMES)).state_dict()
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    about = {
        "name": "seeded",
        "kind": "cifar",
        "model": "resnet20",
        "path": str(folder / "weights.safetensors"),
        "class_names": NAMES,
        "preprocessing": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    (folder / "seeded.yaml").write_text(json.dumps(about))
    return f"backbone=@{folder}/seeded.yaml"


def short(*methods: str, epochs: int = 1) -> list[str]:
    """The words that make the training of these methods short."""
    settings = {"epochs": epochs, "batch_size": 16, "outlier_batch_size": 16}
    return [
        f"methods.{m}.training.{key}={value}" for m in methods for key, value in settings.items()
    ]
