"""Images to features, once per content address, with Ray Data.

The unit of work is a shard: an ordered list of at most `shard_rows` keys, planned before any
work. The dataset has one row per missing shard; an actor of the pool decodes and encodes it in
full batches, writes it whole or not at all, and returns a receipt. So a killed worker, node or
driver costs at most the shards in work, and a second start does only what is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines.backbones import network, onnx_engine
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.input_step import InputStep
from pipelines.backbones.pixel_pass import PixelPass
from pipelines.backbones.tower import MakeEngine
from pipelines.code_digest import Code, Entry, code_of
from pipelines.compute.cluster import ComputeConfig, connect
from pipelines.compute.shard_map import dataset_of, quiet_ray_data
from pipelines.config import UserError
from pipelines.data import features
from pipelines.data.features import FeatureCache
from pipelines.data.shards import Progress, Tally, digest_of_keys, source_code
from pipelines.data.sources import Source
from pipelines.data.storage import Storage
from pipelines.embed.config import EmbedConfig
from pipelines.embed.plan import FeatureIdentity, Plan, make_plan
from pipelines.embed.workers import (
    Encoding,
    ShardEncoder,
    ShardPlan,
    ShardPreparer,
    ShardReceipt,
    Work,
)
from pipelines.store.errors import damaged_in

if TYPE_CHECKING:
    import ray

log = logging.getLogger(__name__)
# Settings that change no feature of an image as it is; a pass has its own in its identity.
NOT_OF_A_FEATURE = {"max_rejected", "decode", "views", "augmentation"}


def embed_source(
    source: Source,
    name: str,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    keys: Sequence[str] | None = None,
    pixel_pass: PixelPass | None = None,
    on_progress: Progress | None = None,
) -> FeatureCache:
    """The features of one source (or of `keys` of it); see `embed_sources`."""
    chosen = None if keys is None else {name: keys}
    return embed_sources(
        {name: source},
        backbone,
        storage,
        settings=settings,
        compute=compute,
        keys=chosen,
        pixel_pass=pixel_pass,
        on_progress=on_progress,
    )[name]


def embed_sources(
    sources: Mapping[str, Source],
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    keys: Mapping[str, Sequence[str]] | None = None,
    pixel_pass: PixelPass | None = None,
    on_progress: Progress | None = None,
) -> dict[str, FeatureCache]:
    """The features of several sources; `embed_for_each` with one backbone and perhaps a pass."""
    (caches,) = embed_for_each(
        sources,
        [backbone],
        storage,
        settings=settings,
        compute=compute,
        keys=keys,
        pixel_pass=pixel_pass,
        on_progress=on_progress,
    )
    return caches


def embed_for_each(
    sources: Mapping[str, Source],
    backbones: Sequence[BackboneConfig],
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    keys: Mapping[str, Sequence[str]] | None = None,
    pixel_pass: PixelPass | None = None,
    on_progress: Progress | None = None,
) -> list[dict[str, FeatureCache]]:
    """The features that each backbone gives of several sources, by source.

    They come from the cache or are made by one pool of actors. Uses the Ray that is there; starts
    one only where a shard is missing and there is none.

    Args:
        sources: by the name that messages and progress use.
        backbones: resolved. Where some of them read texts, these alone give local features.
        storage: holds cache/features.
        settings: batch and shard sizes, decoding, how many bad images to put up with.
        compute: number of actors and what each takes.
        keys: which images of a source; all where a name is missing.
        pixel_pass: what is encoded in place of the images, under an address of its own.
        on_progress: called after each shard with images done, all images, rejected images.

    Raises:
        UserError: for an empty source, an unknown or doubled key among `keys`, more bad
            images than `settings.max_rejected`, an engine that cannot do this.
    """
    found: dict[str, FeatureCache] = {}
    plans: dict[str, Plan] = {}
    encodings: dict[str, Encoding] = {}
    for backbone, (source_name, source) in itertools.product(backbones, sources.items()):
        own, some = _settings(settings, backbone, backbones), (keys or {}).get(source_name)
        _check_engine(own, backbone, compute)
        identity = _identity(source, some, backbone, own, compute, pixel_pass)
        name = _plan_name(source_name, backbone, backbones)
        if (cache := features.find(storage, identity.address)) is not None:
            found[name] = cache
            continue
        plans[name] = make_plan(name, source, identity, keys=some, shard_rows=own.shard_rows)
        encodings[name] = _encoding(backbone, own)
    if plans:
        totals = {name: plan.total for name, plan in plans.items()}
        tally = Tally(totals, settings.max_rejected, on_progress)
        work = replace(_work(encodings, storage, settings, compute), pixel_pass=pixel_pass)
        found |= _make(plans, tally, work, _layout(settings, compute))
    return [{name: found[_plan_name(name, b, backbones)] for name in sources} for b in backbones]


def _encoding(backbone: BackboneConfig, settings: EmbedConfig) -> Encoding:
    how = settings.decoding(backbone.lossless_to)
    return Encoding(backbone, how, settings.local_features)


def _make(
    plans: Mapping[str, Plan], tally: Tally, work: Work, layout: _Layout
) -> dict[str, FeatureCache]:
    """The features of these plans, by the plan's name."""
    _run(plans, tally, work.storage, lambda rows: _encode_shards(rows, plans, work, layout))
    return {name: _finish(plan, tally, work.storage) for name, plan in plans.items()}


def _settings(
    settings: EmbedConfig, backbone: BackboneConfig, backbones: Sequence[BackboneConfig]
) -> EmbedConfig:
    """The settings for one of several backbones: only some have local features."""
    reads_texts = [network.has_text(other) for other in backbones]
    if network.has_text(backbone) or not any(reads_texts):
        return settings
    return settings.model_copy(update={"local_features": False})


def _plan_name(source: str, backbone: BackboneConfig, backbones: Sequence[BackboneConfig]) -> str:
    """A source's name in messages: with the backbone's where there are several."""
    return source if len(backbones) == 1 else f"{source} by {backbone.name}"


def feature_code(
    source: Source,
    backbone: BackboneConfig,
    pixel_pass: PixelPass | None = None,
    engine: Entry | None = None,
) -> Code:
    """The code that can decide a feature, from the plan of shards to the bytes that are written."""
    read = source_code(source)
    more: list[Entry] = [] if pixel_pass is None else [type(pixel_pass)]
    more += [type(pixel_pass.score)] if isinstance(pixel_pass, InputStep) else []
    more += [] if engine is None else [engine]
    return code_of(ShardPreparer, ShardEncoder, make_plan, *network.code(backbone), *read, *more)


def _identity(
    source: Source,
    keys: Sequence[str] | None,
    backbone: BackboneConfig,
    settings: EmbedConfig,
    compute: ComputeConfig,
    pixel_pass: PixelPass | None,
) -> FeatureIdentity:
    """All that changes a byte of one source's cache."""
    return FeatureIdentity(
        backbone=network.identity(backbone),
        device=compute.embed_device,
        settings=settings.model_dump(mode="json", exclude=NOT_OF_A_FEATURE),
        pixel_pass=None if pixel_pass is None else pixel_pass.identity(),
        source=source.fingerprint(),
        keys=digest_of_keys(keys),
        code=feature_code(source, backbone, pixel_pass, _engine(settings)).digest,
    )


def _work(
    encodings: Mapping[str, Encoding],
    storage: Storage,
    settings: EmbedConfig,
    compute: ComputeConfig,
) -> Work:
    return Work(
        encodings=encodings,
        storage=storage,
        batch_size=settings.batch_size,
        threads=compute.embed_threads,
        device=compute.embed_device,
        engine=_engine(settings),
    )


def _check_engine(settings: EmbedConfig, backbone: BackboneConfig, compute: ComputeConfig) -> None:
    """Refuse, before any work, an engine that cannot do it."""
    if _engine(settings) is not None:
        on_gpu = compute.embed_gpus > 0
        onnx_engine.check(backbone, on_gpu=on_gpu, local_features=settings.local_features)


def _engine(settings: EmbedConfig) -> MakeEngine | None:
    """What makes the encoder of a worker's tower; None: torch runs the tower itself."""
    return onnx_engine.engine if settings.engine == "onnxruntime" else None


@dataclass(frozen=True)
class _Layout:
    """How the work is spread: actors and what each takes, and whether tasks decode for them."""

    compute: ComputeConfig
    decode_in_tasks: bool


def _layout(settings: EmbedConfig, compute: ComputeConfig) -> _Layout:
    tasks = settings.decode == "tasks" or (settings.decode == "auto" and compute.embed_gpus > 0)
    return _Layout(compute, tasks)


Receipts = Generator[ShardReceipt, None, None]
Encode = Callable[[list[ShardPlan]], Receipts]


def _run(plans: Mapping[str, Plan], tally: Tally, storage: Storage, encode: Encode) -> None:
    """Count what is there, then let the actors make what is missing."""
    rows = []
    for name, plan in plans.items():
        tally.check(name)
        done = features.finished_shards(storage, plan.address)
        for shard, keys in enumerate(plan.shards):
            known = features.find_receipt(storage, plan.address, shard) if shard in done else None
            if known is not None:
                tally.add(name, known)
            else:
                rows.append(ShardPlan(name, plan.address, shard, keys))
    if rows:
        with contextlib.closing(encode(rows)) as receipts:  # ends Ray's part whatever happens
            for made in receipts:
                tally.add(made.name, made.receipt)


def _encode_shards(
    rows: Sequence[ShardPlan], plans: Mapping[str, Plan], work: Work, layout: _Layout
) -> Receipts:
    """Receipts as they come, of one actor pool over one dataset of shards."""
    with connect(layout.compute), _user_errors():
        for row in _dataset(rows, plans, work, layout).iter_rows():
            yield ShardReceipt.model_validate_json(row["receipt"])


def _dataset(
    rows: Sequence[ShardPlan], plans: Mapping[str, Plan], work: Work, layout: _Layout
) -> ray.data.Dataset:
    import ray.data

    quiet_ray_data()
    compute = layout.compute
    blocks = [row.table() for row in rows]  # one block a shard
    sources = {name: plan.source for name, plan in plans.items()}
    options: dict[str, Any] = {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "fn_constructor_kwargs": {"work": work, "sources": sources},
    }
    dataset = dataset_of(blocks)
    if layout.decode_in_tasks:
        # One actor a free CPU at most: a preparer is cheap, and the pool grows with the need.
        cpus = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
        most = max(1, int(cpus - compute.embed_workers * compute.embed_threads))
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
        dataset = dataset.map_batches(ShardPreparer, compute=pool, num_cpus=1, **options)
    return dataset.map_batches(
        ShardEncoder,
        compute=ray.data.ActorPoolStrategy(size=min(compute.embed_workers, len(blocks))),
        num_cpus=compute.embed_threads,
        num_gpus=compute.embed_gpus,
        **options,
    )


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """A user's mistake met on a worker is one on the driver too, without Ray's traceback."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        if damaged := damaged_in(error):
            raise damaged from None
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise UserError(str(cause)) from None


def _finish(plan: Plan, tally: Tally, storage: Storage) -> FeatureCache:
    cache = features.finish(
        storage,
        plan.address,
        receipts=tally.receipts[plan.name],
        bounds=[(keys[0], keys[-1]) for keys in plan.shards],
        about=plan.identity.content,
    )
    rows, rejected = cache.manifest.rows, cache.manifest.rejected
    log.info("%s: %d features, %d rejected, at %s", plan.name, rows, rejected, plan.address)
    return cache
