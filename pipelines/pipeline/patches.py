"""Maps of patches for the report, from local features that the run keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.backbones import network
from pipelines.backbones.encoder import Preparer
from pipelines.data.features import LOCAL
from pipelines.data.images import Rejected
from pipelines.evaluate.metrics import MetricRow
from pipelines.finetune.cache import load_predictor
from pipelines.run import Run
from pipelines.run.space import FeatureSpace
from pipelines.score.patches import PatchMap, patch_maps, why_no_map

NO_LOCAL = "the run keeps no local features (scores=[gl_mcm], or embed.local_features=true)"


def maps_of(
    run: Run, row: MetricRow, images: Sequence[tuple[str, str]]
) -> list[PatchMap | None] | str:
    """Maps under a method's first seed by the score of a row, or why there are none.

    Args:
        run: whose features are read; nothing is embedded.
        row: of the method.
        images: set and key of each.

    Returns:
        A map of each image, None where its file cannot be read.
    """
    head = run.finetuned.head(row.method)
    space, predictor = run.space_of(head.key), load_predictor(run.storage, head.address)
    columns = [cache.manifest.columns for cache in space.caches.values()]
    kept = [shapes[LOCAL][0] for shapes in columns if LOCAL in shapes]
    why = why_no_map(predictor, lambda: min(kept, default=2))
    if why is not None:
        return why
    if not kept:
        return NO_LOCAL
    crops = _crops(space, images)
    there = [n for n, crop in enumerate(crops) if crop is not None]
    maps: list[PatchMap | None] = [None] * len(images)
    if there:
        # One by one: a shard of local features is large.
        local = np.concatenate([_local(space, *images[n]) for n in there])
        seen = [crop for crop in crops if crop is not None]
        drawn = patch_maps(predictor, row.score, row.params, local, seen)
        for place, one in zip(there, drawn, strict=True):
            maps[place] = one
    return maps


def _crops(
    space: FeatureSpace, images: Sequence[tuple[str, str]]
) -> list[NDArray[np.uint8] | None]:
    """What the backbone sees of each image."""
    config, benchmark = space.run.config, space.run.benchmark
    how = config.embed.decoding(space.backbone.lossless_to)
    preparer = Preparer(network.cropping(space.backbone), how)
    crops = []
    for set_name, key in images:
        content = benchmark.image(set_name, key)
        crop = None if content is None else preparer.one(content)
        crops.append(None if isinstance(crop, Rejected) else crop)
    return crops


def _local(space: FeatureSpace, set_name: str, key: str) -> NDArray[np.float32]:
    """The local features (1, P, D) of an image."""
    chosen = space.run.benchmark.sets[set_name]
    source = chosen.sources[chosen.keys.index(key)]
    return space.caches[source].load([key], LOCAL)
