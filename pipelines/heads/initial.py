"""What a backbone classifies with before any training: its prompts, or its own linear layer."""

from __future__ import annotations

from typing import Any

from pipelines.heads import classifier, zero_shot
from pipelines.heads.base import HeadContext, TextModel


def initial_head(context: HeadContext) -> Any:
    """The zero-shot head of a backbone with a text tower, else the classifier's own layer.

    Margins, the prior over outliers and ODIN start from it.

    Raises:
        UserError: where the classifier does not know a class.
    """
    if isinstance(context.backbone, TextModel):
        return zero_shot.build(zero_shot.Config(), context, 0)
    return classifier.build(classifier.Config(), context, 0)
