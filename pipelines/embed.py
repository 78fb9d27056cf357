"""Images to features, once per content address, with Ray Data.

The unit of work is a shard: an ordered list of at most `shard_rows` keys, planned before any
work. The dataset has one row per missing shard; an actor of the pool decodes and encodes it in
full batches, writes it whole or not at all, and returns a receipt. So a killed worker, node or
driver costs at most the shards in work, and a second start does only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from numpy.typing import NDArray
from pydantic import Field

from pipelines.compute import ComputeConfig
from pipelines.config import Section, UserError, digest, plain
from pipelines.data import features, images
from pipelines.data.features import FeatureCache, Receipt
from pipelines.data.schema import features_table, matrix
from pipelines.data.sources import Source
from pipelines.data.storage import Storage
from pipelines.models import clip, templates
from pipelines.models.clip import BackboneConfig
from pipelines.models.encoder import Encoder

log = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]  # done (with rejected), total, rejected


class EmbedConfig(Section):
    """How images become features."""

    batch_size: int = Field(64, ge=1, description="images encoded at once; the last is padded")
    shard_rows: int = Field(1024, ge=1, description="images of one output file, one unit of work")
    max_rejected: float = Field(0.05, ge=0, le=1, description="share of bad images to put up with")
    background: str = Field("white", description="colour under transparent pixels")
    exif: Literal["ignore", "apply"] = Field(
        "ignore", description="apply turns images as their EXIF orientation says"
    )
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="larger images are rejected")

    def decoding(self) -> images.Decoding:
        """The part that decides how bytes become pixels."""
        return images.Decoding(self.background, self.exif, self.max_pixels)


@dataclass(frozen=True)
class Plan:
    """The shards of one source, before any work."""

    name: str
    source: Source
    address: str
    about: Mapping[str, Any]
    shards: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, str, str], ...]

    @property
    def total(self) -> int:
        """All images, the duplicates among them."""
        return sum(map(len, self.shards)) + len(self.duplicates)


@dataclass
class Tally:
    """Receipts as they come, and whether too many images were bad."""

    plans: Mapping[str, Plan]
    max_rejected: float
    on_progress: Progress | None = None
    receipts: dict[str, list[Receipt]] = field(default_factory=dict)

    def add(self, name: str, receipt: Receipt) -> None:
        """Count one shard.

        Raises:
            UserError: past `max_rejected` of the source's images.
        """
        self.receipts[name].append(receipt)
        self.check(name)
        if self.on_progress is not None:
            lost = {name: len(self.rejected(name)) for name in self.plans}
            total = sum(plan.total for plan in self.plans.values())
            rows = sum(r.rows for receipts in self.receipts.values() for r in receipts)
            self.on_progress(rows + sum(lost.values()), total, sum(lost.values()))

    def rejected(self, name: str) -> list[tuple[str, str, str]]:
        """The bad images of a source so far: key, reason, message."""
        inside = [row for receipt in self.receipts[name] for row in receipt.rejected]
        return [*self.plans[name].duplicates, *inside]

    def check(self, name: str) -> None:
        """Stop past `max_rejected`, or where nothing is left."""
        rejected, total = self.rejected(name), self.plans[name].total
        if len(rejected) <= self.max_rejected * total and len(rejected) < total:
            return
        reasons = Counter(reason for _, reason, _ in rejected)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        first = "; ".join(f"{key}: {message}" for key, _, message in sorted(rejected)[:3])
        allowed = f"max_rejected={self.max_rejected:g}" if len(rejected) < total else "none is left"
        raise UserError(
            f"source {name}: {len(rejected)} of {total} images cannot be used, {allowed} "
            f"({counts}); first: {first}"
        )


def embed_source(
    source: Source,
    name: str,
    backbone: BackboneConfig,
    storage: Storage,
    *,
    settings: EmbedConfig,
    compute: ComputeConfig,
    keys: Sequence[str] | None = None,
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
    on_progress: Progress | None = None,
) -> dict[str, FeatureCache]:
    """The features of several sources, found or made by one pool of actors.

    Needs an initialised Ray only where a shard is missing.

    Args:
        sources: by the name that messages and progress use.
        backbone: resolved, see `pipelines.models.clip.resolve`.
        storage: holds cache/features.
        settings: batch and shard sizes, decoding, how many bad images to put up with.
        compute: number of actors and what each takes.
        keys: which images of a source; all where a name is missing.
        on_progress: called after each shard with images done, all images, rejected images.

    Raises:
        UserError: for an empty source, an unknown or doubled key among `keys`, or more bad
            images than `settings.max_rejected`.
    """
    chosen = keys or {}
    device = "cuda" if compute.embed_gpus else "cpu"
    about: dict[str, Any] = {"backbone": clip.identity(backbone), "device": device}
    about["settings"] = _address_part(settings)
    found: dict[str, FeatureCache] = {}
    plans: dict[str, Plan] = {}
    for name, source in sources.items():
        named = {**about, "source": source.fingerprint(), "keys": _keys_digest(chosen.get(name))}
        cache = features.find(storage, digest(named))
        if cache is not None:
            found[name] = cache
        else:
            plans[name] = _plan(name, source, named, keys=chosen.get(name), settings=settings)
    if plans:
        tally = Tally(plans, settings.max_rejected, on_progress, {name: [] for name in plans})
        pool = _Pool(backbone, storage, settings, compute)
        _run(plans, tally, pool)
        found |= {name: _finish(plan, tally, pool) for name, plan in plans.items()}
    return {name: found[name] for name in sources}


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
    what = {"backbone": clip.identity(backbone), "texts": texts, "classes": len(class_names)}
    parts = ("cache", "text", f"{digest(what)}.parquet")
    if not storage.exists(*parts):
        encoded = clip.load(backbone).encode_text(texts)
        mean = encoded.reshape(len(class_names), len(chosen_templates), -1).mean(dim=1)
        unit = torch.nn.functional.normalize(mean, dim=-1).numpy()
        storage.write_table(features_table(list(class_names), unit), *parts)
    return matrix(storage.read_table(*parts)["feature"])


def _address_part(settings: EmbedConfig) -> dict[str, Any]:
    """What of the settings changes a byte of the cache."""
    return {key: value for key, value in plain(settings).items() if key != "max_rejected"}


def _keys_digest(keys: Sequence[str] | None) -> str:
    if keys is None:
        return "all"
    return hashlib.sha256("\0".join(sorted(keys)).encode()).hexdigest()


def _plan(
    name: str,
    source: Source,
    about: Mapping[str, Any],
    *,
    keys: Sequence[str] | None,
    settings: EmbedConfig,
) -> Plan:
    indexed = source.index()["key"].combine_chunks()
    if not len(indexed):
        raise UserError(f"source {name}: no image")
    doubled: list[str] = []
    if keys is None:
        counts = pc.value_counts(indexed).to_pylist()
        doubled = [row["values"] for row in counts for _ in range(row["counts"] - 1)]
        ordered = sorted(row["values"] for row in counts)
    else:
        ordered = sorted(keys)
        _check_chosen(name, ordered, indexed)
    message = "another image has this key; the first is used"
    rows = settings.shard_rows
    return Plan(
        name=name,
        source=source,
        address=digest(about),
        about=about,
        shards=tuple(tuple(ordered[i : i + rows]) for i in range(0, len(ordered), rows)),
        duplicates=tuple((key, "duplicate_key", message) for key in doubled),
    )


def _check_chosen(name: str, keys: Sequence[str], indexed: pa.Array) -> None:
    if not keys:
        raise UserError(f"source {name}: no image chosen")
    twice = [key for key, after in itertools.pairwise(keys) if key == after]
    if twice:
        raise UserError(f"source {name}: {len(twice)} keys chosen twice (first: {twice[0]})")
    known = pc.is_in(pa.array(keys, pa.string()), value_set=indexed).to_numpy(zero_copy_only=False)
    if not known.all():
        first = keys[int(np.argmin(known))]
        raise UserError(
            f"source {name}: {int((~known).sum())} of {len(keys)} chosen keys are not in it "
            f"(first: {first})"
        )


@dataclass(frozen=True)
class _Pool:
    """What every actor needs; small enough to send."""

    backbone: BackboneConfig
    storage: Storage
    settings: EmbedConfig
    compute: ComputeConfig


class _EncodingActor:
    """Loads the backbone once, then turns plan rows into shards on disk."""

    def __init__(self, pool: _Pool, sources: Mapping[str, Source]) -> None:
        threads = pool.compute.embed_threads
        torch.set_num_threads(threads)
        device = "cuda" if pool.compute.embed_gpus else "cpu"
        loaded = clip.load(pool.backbone, device=device)
        settings = pool.settings
        self.encoder = Encoder(loaded, settings.decoding(), settings.batch_size, threads)
        self.storage = pool.storage
        self.sources = sources

    def __call__(self, batch: pa.Table) -> pa.Table:
        receipts = [self._shard(row) for row in batch.to_pylist()]
        return pa.table({"receipt": [json.dumps(receipt) for receipt in receipts]})

    def _shard(self, row: Mapping[str, Any]) -> dict[str, Any]:
        name, address, shard, keys = row["name"], row["address"], row["shard"], row["keys"]
        if shard in features.finished_shards(self.storage, address):  # by a run beside this one
            receipt = features.inspect_shard(self.storage, address, shard)
        else:
            encoded, verdicts = self.encoder.encode(self.sources[name].read(keys))
            pairs = list(zip(keys, verdicts, strict=True))
            good = [key for key, verdict in pairs if verdict is None]
            bad = [(key, v.reason, v.message) for key, v in pairs if v is not None]
            receipt = features.write_shard(
                self.storage, address, shard=shard, columns=(good, encoded), rejected=bad
            )
        return {"name": name, **asdict(receipt)}


def _run(plans: Mapping[str, Plan], tally: Tally, pool: _Pool) -> None:
    """Count what is there, then let the actors make what is missing."""
    rows = []
    for name, plan in plans.items():
        tally.check(name)
        done = features.finished_shards(pool.storage, plan.address)
        for shard, keys in enumerate(plan.shards):
            if shard in done:
                tally.add(name, features.inspect_shard(pool.storage, plan.address, shard))
            else:
                row = {"name": name, "address": plan.address, "shard": shard, "keys": list(keys)}
                rows.append(row)
    if rows:
        sources = {name: plan.source for name, plan in plans.items()}
        for receipt in _encode_shards(rows, sources, pool):
            name = receipt.pop("name")
            rejected = tuple((k, r, m) for k, r, m in receipt.pop("rejected"))
            tally.add(name, Receipt(**receipt, rejected=rejected))


def _encode_shards(
    rows: Sequence[Mapping[str, Any]], sources: Mapping[str, Source], pool: _Pool
) -> Iterator[dict[str, Any]]:
    """Receipts as they come, of one actor pool over one dataset of shards."""
    compute = pool.compute
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = [pa.Table.from_pylist([row]) for row in rows]  # one block a shard
    workers = min(compute.embed_workers, len(blocks))
    dataset = ray.data.from_arrow(blocks).map_batches(
        _EncodingActor,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=workers),
        fn_constructor_kwargs={"pool": pool, "sources": dict(sources)},
        num_cpus=compute.embed_threads,
        num_gpus=compute.embed_gpus,
    )
    with _user_errors():
        for row in dataset.iter_rows():
            yield json.loads(row["receipt"])


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """A user's mistake met on a worker is one on the driver too, without Ray's traceback."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise UserError(str(cause)) from None


def _finish(plan: Plan, tally: Tally, pool: _Pool) -> FeatureCache:
    cache = features.finish(
        pool.storage,
        plan.address,
        receipts=tally.receipts[plan.name],
        bounds=[(keys[0], keys[-1]) for keys in plan.shards],
        about=plan.about,
        rejected=plan.duplicates,
    )
    rows, rejected = cache.manifest["rows"], cache.manifest["rejected"]
    log.info("%s: %d features, %d rejected, at %s", plan.name, rows, rejected, plan.address)
    return cache
