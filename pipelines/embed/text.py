"""Class names in templates to text features, once per content address.

cache/text/ADDRESS.parquet   class name and the zero-shot feature of its prompts
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.backbones import clip, templates
from pipelines.backbones.clip import BackboneConfig, Clip
from pipelines.code_digest import Code, code_of
from pipelines.config import digest
from pipelines.data import kept
from pipelines.data.schema import features_table, matrix
from pipelines.data.storage import Storage


def text_features(
    class_names: Sequence[str],
    chosen_templates: Sequence[str],
    backbone: BackboneConfig,
    storage: Storage,
) -> NDArray[np.float32]:
    """The zero-shot classifier (K, D): per class the mean over templates of unit text features.

    Each mean is normalised again (Radford et al. 2021, section 3.1.4). Kept in cache/text.
    """
    texts = templates.prompts(class_names, chosen_templates)
    what = {"backbone": clip.identity(backbone), "texts": texts, "classes": len(class_names)}
    parts = ("cache", "text", f"{digest([what, text_code().digest])}.parquet")
    table = kept.find_table(storage, *parts)
    if table is None:
        unit = _encode(clip.load(backbone), texts, len(class_names))
        table = features_table(list(class_names), unit)
        kept.write_table(storage, table, *parts)
    return matrix(table["feature"])


def text_code() -> Code:
    """The code that can decide a text feature."""
    return code_of(_encode, "pipelines.backbones.clip.load", alone=(text_features,))


def _encode(model: Clip, texts: Sequence[str], num_classes: int) -> NDArray[np.float32]:
    encoded = model.encode_text(texts)
    mean = encoded.reshape(num_classes, len(texts) // num_classes, -1).mean(dim=1)
    unit: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return unit
