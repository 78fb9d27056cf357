"""Class names in templates to text features, once per content address.

cache/text/ADDRESS.parquet   class name and the zero-shot feature of its prompts
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.backbones import network, templates
from pipelines.backbones.clip import Clip
from pipelines.backbones.description import BackboneConfig
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
    what = {"backbone": network.identity(backbone), "texts": texts, "classes": len(class_names)}
    parts = ("cache", "text", f"{digest([what, text_code(backbone).digest])}.parquet")
    table = kept.find_table(storage, *parts)
    if table is None:
        model = network.load(backbone)
        assert isinstance(model, Clip), "who asks for text has looked at `network.has_text`"
        unit = _encode(model, texts, len(class_names))
        table = features_table(list(class_names), unit)
        kept.write_table(storage, table, *parts)
    return matrix(table["feature"])


def text_code(backbone: BackboneConfig) -> Code:
    """The code that can decide a text feature."""
    return code_of(
        _encode, "pipelines.backbones.network.load", *network.code(backbone), alone=(text_features,)
    )


def _encode(model: Clip, texts: Sequence[str], num_classes: int) -> NDArray[np.float32]:
    encoded = model.encode_text(texts)
    mean = encoded.reshape(num_classes, len(texts) // num_classes, -1).mean(dim=1)
    unit: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return unit
