"""Classes that a text tower cannot tell apart: their prompts are equal where the tower cuts them.

A tower reads the first `context_length` tokens. Two long names that differ after those have one
text feature, and every image of the two would be a draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.backbones import clip
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.open_clip_files import architecture
from pipelines.backbones.templates import prompts
from pipelines.config import UserError

# Unit features of different texts lie far further apart; the same text in another place of a
# batch differs in its last bits.
_EQUAL = 1e-5


def refuse_equal_prompts(
    class_names: Sequence[str], templates: Sequence[str], backbone: BackboneConfig
) -> None:
    """Refuse classes whose prompts have the same tokens; needs no weights.

    Raises:
        UserError: naming the two.
    """
    length = clip.context_length(architecture(backbone))
    texts = prompts(class_names, templates)
    # A token is a byte at least, and two of them are the marks of beginning and end.
    if max(len(text.encode()) for text in texts) <= length - 2:
        return
    tokens = clip.tokenizer(backbone)(texts)
    _refuse(tokens.reshape(len(class_names), -1).to(torch.float64), class_names, 0.5)


def refuse_equal_features(text_features: Tensor, class_names: Sequence[str]) -> None:
    """Refuse classes whose unit text features (K, D) are equal.

    Raises:
        UserError: naming the two.
    """
    _refuse(text_features.detach().to("cpu", torch.float64), class_names, _EQUAL)


def _refuse(rows: Tensor, class_names: Sequence[str], distance: float) -> None:
    for k, row in enumerate(rows[:-1]):
        near = torch.linalg.vector_norm(rows[k + 1 :] - row, dim=1) < distance
        if near.any():
            other = k + 1 + int(near.int().argmax())
            raise UserError(
                f"the classes {class_names[k]!r} and {class_names[other]!r} are one text to this "
                "backbone (it reads the first tokens of a prompt, without case); give them shorter "
                "names that differ early, or make them one class"
            )
