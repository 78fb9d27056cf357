"""A benchmark's features of every backbone of a run, and the leak check."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.backbones import network
from pipelines.backbones.class_texts import refuse_equal_prompts
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.pixel_pass import PixelPass
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.benchmarks import Benchmark
from pipelines.data.features import FeatureCache
from pipelines.data.shards import Progress
from pipelines.data.storage import Storage
from pipelines.embed import leaks
from pipelines.embed.config import EmbedConfig
from pipelines.embed.result import EmbeddedSource, EmbedResult, Rejection
from pipelines.embed.stage import embed_for_each, embed_sources
from pipelines.records import Role


def embed_benchmark(
    benchmark: Benchmark,
    backbones: Sequence[BackboneConfig],
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    shared_images: tuple[str, ...],
    on_progress: Progress | None = None,
) -> list[EmbedResult]:
    """The features of every image that some set of a benchmark needs, from the cache or made.

    Args:
        benchmark: its sources and sets.
        backbones: resolved; at least one.
        storage: holds cache/features.
        settings: as `embed_sources`.
        compute: as `embed_sources`.
        shared_images: the path, in parts, of the file that names images of two sets.
        on_progress: as `embed_sources`.

    Raises:
        UserError: where an image serves two purposes (`pipelines.embed.leaks`), two classes are
            one text to the backbone, and as `embed_sources`.
    """
    for backbone in backbones:
        _refuse_equal_classes(benchmark, backbone)
    keys = benchmark.keys_by_source()
    found = embed_for_each(
        {name: benchmark.sources[name] for name in keys},
        backbones,
        storage,
        settings=settings,
        compute=compute,
        keys=keys,
        on_progress=on_progress,
    )
    shared = leaks.refuse(benchmark, found[0], storage, shared_images)
    return [
        EmbedResult(
            benchmark=benchmark.name,
            backbone=dict(network.identity(backbone)),
            sources={name: _embedded(cache) for name, cache in caches.items()},
            shared=shared,
        )
        for backbone, caches in zip(backbones, found, strict=True)
    ]


def embed_pass(
    benchmark: Benchmark,
    roles: Sequence[Role],
    pixel_pass: PixelPass,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    on_progress: Progress | None = None,
) -> dict[str, FeatureCache]:
    """What a pass over the pixels gives of the images of some sets, by source.

    Args:
        benchmark: its sources and sets.
        roles: of the sets whose images are meant.
        pixel_pass: what is encoded in place of the images as they are.
        backbone: resolved.
        storage: holds cache/features.
        settings: as `embed_sources`; a pass has no local features.
        compute: as there.
        on_progress: as there.

    Raises:
        UserError: as there.
    """
    keys = benchmark.keys_by_source(*roles)
    return embed_sources(
        {source: benchmark.sources[source] for source in keys},
        backbone,
        storage,
        settings=settings.model_copy(update={"local_features": False}),
        compute=compute,
        keys=keys,
        pixel_pass=pixel_pass,
        on_progress=on_progress,
    )


def _embedded(cache: FeatureCache) -> EmbeddedSource:
    """What the stage's record says of one source."""
    return EmbeddedSource(
        address=cache.address,
        rows=cache.manifest.rows,
        rejected=tuple(Rejection(**row) for row in cache.rejected().to_pylist()),
    )


def _refuse_equal_classes(benchmark: Benchmark, backbone: BackboneConfig) -> None:
    """Refuse classes that are one text to the backbone, where it reads texts."""
    if network.has_text(backbone):
        refuse_equal_prompts(benchmark.class_names, benchmark.templates, backbone)
