"""Which images make which shard, decided before any work, and the count while they are made."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import JsonValue

from pipelines.backbones.pixel_pass import LayersIdentity, StepIdentity
from pipelines.config import UserError, digest
from pipelines.data.features import Receipt
from pipelines.data.index_table import check_keys
from pipelines.data.sources import Source
from pipelines.records import Record

Progress = Callable[[int, int, int], None]  # done (with rejected), total, rejected


class FeatureIdentity(Record):
    """Everything that changes a byte of the features of one source.

    Attributes:
        backbone: the fields that decide a feature (`pipelines.backbones.network.identity`).
        device: cpu or cuda.
        settings: the fields of `EmbedConfig` that change a feature, by name.
        pixel_pass: what is encoded in place of the images as they are.
        source: the fingerprint of the images.
        keys: `all`, or a digest of those that were chosen.
        code: the digest of what computes.
    """

    backbone: dict[str, str]
    device: str
    settings: dict[str, bool | int | float | str]
    pixel_pass: StepIdentity | LayersIdentity | None = None
    source: str
    keys: str
    code: str

    @property
    def content(self) -> dict[str, JsonValue]:
        """What the address is a digest of, and the manifest keeps."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def address(self) -> str:
        """The address of the features."""
        return digest(self.content)


@dataclass(frozen=True)
class Plan:
    """The shards of one source, before any work."""

    name: str
    source: Source
    identity: FeatureIdentity
    shards: tuple[tuple[str, ...], ...]

    @cached_property
    def address(self) -> str:
        """The address of the features."""
        return self.identity.address

    @property
    def total(self) -> int:
        """All images."""
        return sum(map(len, self.shards))


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
        return [row for receipt in self.receipts[name] for row in receipt.rejected]

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


def make_plan(
    name: str,
    source: Source,
    identity: FeatureIdentity,
    *,
    keys: Sequence[str] | None,
    shard_rows: int,
) -> Plan:
    """Cut a source, or `keys` of it, into shards of at most `shard_rows` keys in order.

    Args:
        name: of the source, for messages.
        source: the images.
        identity: what goes into the address.
        keys: which images; all where None.
        shard_rows: images of a shard.

    Raises:
        UserError: for an empty source, one with a key that does not name one image, and for a
            key chosen twice or unknown.
    """
    indexed = source.index()["key"].combine_chunks()
    if not len(indexed):
        raise UserError(f"source {name}: no image")
    check_keys(indexed, f"source {name}")
    ordered = sorted(indexed.to_pylist() if keys is None else keys)
    if keys is not None:
        _check_chosen(name, ordered, indexed)
    starts = range(0, len(ordered), shard_rows)
    return Plan(
        name=name,
        source=source,
        identity=identity,
        shards=tuple(tuple(ordered[start : start + shard_rows]) for start in starts),
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
