"""What heads use of a loaded backbone, whatever its kind."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Backbone(Protocol):
    """What a head uses of any loaded backbone (`pipelines.backbones.tower.Tower`)."""

    @property
    def name(self) -> str:
        """In messages."""

    @property
    def embed_dim(self) -> int:
        """D."""

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied by to give logits."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""


@runtime_checkable
class TextModel(Backbone, Protocol):
    """What a head uses of one with a text tower (`pipelines.backbones.clip.Clip`)."""

    @property
    def model(self) -> Any:
        """The open_clip model, frozen."""

    @property
    def tokenizer(self) -> Any:
        """Texts to tokens (K, L)."""

    def encode_text(self, texts: Any) -> Tensor:
        """Unit text features (K, D), float32."""


@runtime_checkable
class ClassifierModel(Backbone, Protocol):
    """What a head uses of a classifier (`pipelines.backbones.classifier.ImageClassifier`)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the rows of W."""

    @property
    def weight(self) -> NDArray[np.float32]:
        """W (K, D) of its last layer."""

    @property
    def bias(self) -> NDArray[np.float32]:
        """The layer's b (K,)."""
