"""What prompts of each image's own cost: CoCoOp beside CoOp, and when it judges.

Random weights and features, since speed does not depend on them; 7 classes (PACS), 4 context tokens
and 4 images a step (CoCoOp's recipe), one thread. CoOp's text is that of the classes alone, so
its step costs the same for any number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F

from pipelines.heads import HeadContext, build
from pipelines.heads.cocoop import Config as CoCoOpConfig
from pipelines.heads.coop import Config as CoOpConfig
from pipelines.speed.measure import Row, compare

# Text towers by name: a published one, and that of the miniature stand-in mini_rn_64.
TOWERS: dict[str, dict[str, int]] = {
    "width 128, 3 layers": {"width": 128, "heads": 4, "layers": 3, "context_length": 32},
    "ViT-B/16's": {"width": 512, "heads": 8, "layers": 12},
}
NAMES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
BATCH, CONTEXT, JUDGED, LOGIT_SCALE = 4, 4, 64, 100.0


class _Backbone:
    """A random text tower as a head needs it."""

    def __init__(self, tower: dict[str, int]) -> None:
        vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
        self.name = "random"
        self.embed_dim = tower["width"]
        model = open_clip.CLIP(embed_dim=self.embed_dim, vision_cfg=vision, text_cfg=tower)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=tower.get("context_length", 77))
        self.logit_scale = LOGIT_SCALE

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def encode_text(self, texts: Any) -> torch.Tensor:
        features: torch.Tensor = self.model.encode_text(self.tokenizer(list(texts)), normalize=True)
        return features


def rows(scale: float) -> list[Row]:
    """A step and the judging of images, for each tower.

    Args:
        scale: factor on the number of images that are judged, in (0, 1].
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name, tower in TOWERS.items() for row in _of(name, tower, scale)]
    finally:
        torch.set_num_threads(before)


def _of(name: str, tower: dict[str, int], scale: float) -> list[Row]:
    torch.manual_seed(0)
    backbone, count = _Backbone(tower), max(1, round(JUDGED * scale))
    features = F.normalize(torch.randn(max(BATCH, count), backbone.embed_dim), dim=-1)
    labels = torch.arange(len(features)) % len(NAMES)
    context = HeadContext(backbone, NAMES, ("{}",), features, labels)
    heads = {}
    for config in (CoCoOpConfig(num_context=CONTEXT), CoOpConfig(num_context=CONTEXT)):
        heads[config.name] = build(config, context, 0)
    step = compare(
        f"cocoop: step of {BATCH} images, {len(NAMES)} classes, tower {name}",
        _step(heads["cocoop"], context),
        reference="coop's step",
        reference_call=_step(heads["coop"], context),
    )
    images = features[:count].numpy()
    predictors = {name: head.predictor() for name, head in heads.items()}
    judged = compare(
        f"cocoop: {count} images judged, tower {name}",
        lambda: predictors["cocoop"].similarity(images),
        reference="coop",
        reference_call=lambda: predictors["coop"].similarity(images),
    )
    size = sum(array.nbytes for array in predictors["cocoop"].arrays.values())
    assert judged.seconds is not None
    note = f"{judged.seconds / count * 1000:.3g} s per 1,000 images; the head is {size >> 10} KiB"
    return [step, replace(judged, note=note)]


def _step(head: Any, context: HeadContext) -> Callable[[], None]:
    """Forward, backward and update of one batch."""
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    features, labels = context.features[:BATCH], context.labels[:BATCH]

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features) * head.logit_scale, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
