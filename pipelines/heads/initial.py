"""What a backbone classifies with before any training: its prompts, or its own linear layer."""

from __future__ import annotations

from typing import Any

from pipelines.heads.base import HeadContext
from pipelines.heads.classifier import Config as ClassifierConfig
from pipelines.heads.classifier import build as build_classifier
from pipelines.heads.models import TextModel
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from pipelines.heads.zero_shot import build as build_zero_shot


def initial_head(context: HeadContext) -> Any:
    """The zero-shot head of a backbone with a text tower, else the classifier's own layer.

    Margins, the prior over outliers and ODIN start from it.

    Raises:
        UserError: where the classifier does not know a class.
    """
    if isinstance(context.backbone, TextModel):
        return build_zero_shot(ZeroShotConfig(), context, 0)
    return build_classifier(ClassifierConfig(), context, 0)
