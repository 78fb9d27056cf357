"""GalLoP: several prompts for the whole image, and several for its local features.

Lafon 2024, "GalLoP: Learning Global and Local Prompts for Vision-Language Models" (public code:
MarcLafon/gallop). A global prompt is compared with the image's feature. A local prompt is
compared with every local feature, and for each class the mean over the k most similar ones counts;
k differs from prompt to prompt. A linear map, the identity at first, moves local features closer
to text.

    similarity = (mean over global prompts + mean over local prompts) / 2

The published k are 5, 10, 15 and 20 of the 196 local features of ViT-B/16. Here they are shares,
so that other backbones keep the proportion, and each k is at least one more than the one before:
prompts that begin alike and average the same local features would stay alike. The published map
acts before the image tower's last projection; ours after it, on the cached features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from pipelines.heads import base, coop, rules
from pipelines.heads.base import (
    LOCAL,
    Arrays,
    HeadConfig,
    HeadContext,
    HeadOutput,
    HeadPlugin,
    Predictor,
    Settings,
)
from pipelines.heads.coop import CoOp


class Config(HeadConfig):
    """Global and local learned prompts."""

    name: Literal["gallop"] = "gallop"
    prompt: coop.Config = Field(coop.Config(), description="of every prompt, CoOp's settings")
    num_global: int = Field(4, ge=1, description="prompts for the whole image")
    scales: list[float] = Field(
        [0.025, 0.05, 0.075, 0.1],
        description="one local prompt each: the share of the local features that it averages",
    )
    project: bool = Field(True, description="learn a linear map of the local features")
    columns: ClassVar[tuple[str, ...]] = (LOCAL,)

    @field_validator("scales")
    @classmethod
    def _shares(cls, scales: list[float]) -> list[float]:
        if any(not 0 < share <= 1 for share in scales) or sorted(scales) != scales:
            raise ValueError(
                f"scales={scales}: shares of the local features in (0, 1], in rising order"
            )
        return scales


def num_averaged(scales: list[float], num_local: int) -> list[int]:
    """How many local features each local prompt averages, of `num_local`."""
    counts: list[int] = []
    for share in scales:
        least = counts[-1] + 1 if counts else 1
        counts.append(min(num_local, max(least, round(share * num_local))))
    return counts


class GalLoP(nn.Module):
    """Learned contexts for images and for local features, and a linear map of the latter."""

    def __init__(
        self,
        prompts: list[CoOp],
        local_prompts: list[CoOp],
        projection: Tensor | None,
        scales: list[float],
    ) -> None:
        """Keep the prompts; `projection` (D, D) is what the map starts from, or None."""
        super().__init__()
        self.prompts = nn.ModuleList(prompts)
        self.local_prompts = nn.ModuleList(local_prompts)
        self.projection = None if projection is None else nn.Parameter(projection)
        self.scales = scales
        self.logit_scale = prompts[0].logit_scale
        self.class_names = prompts[0].class_names

    def text_features(self) -> Tensor:
        """(K, D) unit length: the direction of the mean over the global prompts."""
        return F.normalize(_encoded(self.prompts).mean(dim=0), dim=-1)

    def encode(self, image_features: Tensor, local_features: Tensor) -> HeadOutput:
        """Similarity of (N, D) unit features and (N, P, D) unit local features.

        `rows["global"]` (N, G, K) and `rows["local"]` (N, L, K) are those of each prompt.
        """
        text = _encoded(self.prompts)
        whole = torch.einsum("nd,gkd->ngk", image_features, text)
        rows = {"global": whole}
        similarity = whole.mean(dim=1)
        if len(self.local_prompts):
            rows["local"] = self._local(local_features)
            similarity = (similarity + rows["local"].mean(dim=1)) / 2
        direction = F.normalize(text.mean(dim=0), dim=-1)
        return HeadOutput(similarity, image_features, direction, rows=rows)

    def _local(self, local_features: Tensor) -> Tensor:
        """(N, L, K): of each local prompt, the mean over each class's most similar features."""
        if self.projection is not None:
            local_features = F.normalize(local_features @ self.projection.T, dim=-1)
        counts = num_averaged(self.scales, local_features.shape[1])
        text = _encoded(self.local_prompts)
        each = torch.einsum("npd,lkd->lnpk", local_features, text)
        ordered = each.topk(max(counts), dim=2).values
        means = [part[:, :count].mean(dim=1) for part, count in zip(ordered, counts, strict=True)]
        return torch.stack(means, dim=1)

    def forward(self, image_features: Tensor, local_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features, local_features).similarity

    def predictor(self) -> Predictor:
        """The prompts and the map as they are now."""
        with torch.no_grad():
            # The mean of unit features, not of unit length: its products are the mean cosines.
            arrays = {"text_features": base.to_numpy(_encoded(self.prompts).mean(dim=0))}
            if len(self.local_prompts):
                arrays["local_text_features"] = base.to_numpy(_encoded(self.local_prompts))
                if self.projection is not None:
                    arrays["projection"] = base.to_numpy(self.projection)
        settings = {"scales": self.scales}
        return Predictor("gallop", arrays, settings, self.logit_scale, self.class_names)


def _encoded(prompts: nn.ModuleList) -> Tensor:
    """(G, K, D) unit length."""
    return torch.stack([prompt.text_features() for prompt in prompts])  # type: ignore[operator]


def build(config: Config, context: HeadContext, seed: int) -> GalLoP:
    """Prompts of the context's classes; the first global one begins as CoOp's would.

    Raises:
        UserError: where a prompt is longer than the text tower takes.
    """
    made = [
        coop.build(config.prompt, context, seed + number)
        for number in range(config.num_global + len(config.scales))
    ]
    dim = context.features.shape[1]
    projection = torch.eye(dim, device=context.features.device) if config.project else None
    local_prompts = made[config.num_global :]
    return GalLoP(
        made[: config.num_global],
        local_prompts,
        projection if local_prompts else None,
        config.scales,
    )


def global_similarity(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The mean over the global prompts (N, K)."""
    return rules.text_similarity(arrays, settings, features)


def local_similarity(
    arrays: Arrays,
    settings: Settings,  # noqa: ARG001 - one signature for every head
    local: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The mean over the local prompts for each local feature (N, P, K)."""
    text = arrays.get("local_text_features")
    chosen = arrays["text_features"] if text is None else text.mean(axis=0)
    product: NDArray[np.float64] = _projected(arrays, local) @ chosen.T
    return product


def similarity(
    arrays: Arrays,
    settings: Settings,
    features: NDArray[np.float64],
    local: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of the predictor, in float64."""
    whole = global_similarity(arrays, settings, features)
    if "local_text_features" not in arrays:
        return whole
    moved = _projected(arrays, local)
    counts = num_averaged(rules.numbers(settings, "scales"), local.shape[1])
    means = []
    for text, count in zip(arrays["local_text_features"], counts, strict=True):
        ordered = np.sort(moved @ text.T, axis=1)
        means.append(ordered[:, -count:].mean(axis=1))
    blended: NDArray[np.float64] = (whole + np.mean(means, axis=0)) / 2
    return blended


def _projected(
    arrays: Mapping[str, NDArray[np.float64]], local: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Local features (N, P, D) after the linear map, unit length."""
    if "projection" not in arrays:
        return local
    moved = local @ arrays["projection"].T
    # Rows of a padded block are zero; they are cut off afterwards.
    lengths = np.maximum(np.linalg.norm(moved, axis=-1, keepdims=True), 1e-12)
    scaled: NDArray[np.float64] = moved / lengths
    return scaled


PLUGIN = HeadPlugin(
    Config,
    build,
    similarity,
    compared=rules.unchanged,
    global_similarity=global_similarity,
    local_similarity=local_similarity,
)
