"""The activations of a network's layers that scores are fitted to: a pass over training images."""

from __future__ import annotations

from dataclasses import replace

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.pixel_pass import LayerPass
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import UserError
from pipelines.data.benchmarks import Benchmark
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.shards import Progress
from pipelines.data.storage import Storage
from pipelines.embed.config import EmbedConfig
from pipelines.fitted.plan import FitData


def added(
    data: FitData,
    benchmark: Benchmark,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    on_progress: Progress | None = None,
) -> FitData:
    """The training data with the activations of the backbone's layers, from the cache or made.

    Args:
        data: features and labels of the training set.
        benchmark: its images.
        backbone: resolved; it names the layers.
        storage: holds cache/features.
        settings: as `pipelines.embed.stage.embed_sources`.
        compute: as there.
        on_progress: as there.

    Raises:
        UserError: where an image has features and no activations.
    """
    from pipelines.embed.benchmark import embed_pass  # takes seconds, and a found run needs it not

    caches = embed_pass(
        benchmark,
        ["train"],
        LayerPass(backbone.layers),
        backbone,
        storage,
        settings=settings,
        compute=compute,
        on_progress=on_progress,
    )
    sets = FeatureSets(benchmark, caches)
    layers = sets.for_training().load("train").features
    if len(layers) != len(data.features):
        raise UserError(
            f"backbone {backbone.name}: of {len(data.features)} training images with features, "
            f"{len(layers)} have finite activations of its layers; leave out layer_mahalanobis"
        )
    return replace(
        data,
        layers=layers,
        layer_sizes=tuple(backbone.layers.values()),
        layers_address=sets.address(["train"]),
    )
