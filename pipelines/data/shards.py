"""The shards of a source: planned before any work, counted while they are made.

A shard is an ordered list of keys. `pipelines.embed` makes features of them and `pipelines.train`
decoded pixels; which images there are, which of them are chosen, and how many may be bad is the
same for both.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.code_digest import PACKAGES, Entry
from pipelines.config import UserError
from pipelines.data.features import Receipt
from pipelines.data.index_table import check_keys
from pipelines.data.sources import Source

Progress = Callable[[int, int, int], None]  # done (with rejected), total, rejected
Shards = tuple[tuple[str, ...], ...]


@dataclass
class Tally:
    """The receipts of the shards as they come, and whether too many images were bad.

    Attributes:
        totals: the number of planned images of each source, by its name.
        max_rejected: the share of a source's images that may be bad, 0 to 1.
        on_progress: called after each shard, over all sources.
        receipts: those of the finished shards, by the name of the source.
    """

    totals: Mapping[str, int]
    max_rejected: float
    on_progress: Progress | None = None
    receipts: dict[str, list[Receipt]] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with no receipt of any source."""
        self.receipts = {name: [] for name in self.totals}

    def add(self, name: str, receipt: Receipt) -> None:
        """Count one shard.

        Raises:
            UserError: past `max_rejected` of the source's images.
        """
        self.receipts[name].append(receipt)
        self.check(name)
        if self.on_progress is not None:
            lost = {name: len(self.rejected(name)) for name in self.totals}
            total = sum(self.totals.values())
            rows = sum(r.rows for receipts in self.receipts.values() for r in receipts)
            self.on_progress(rows + sum(lost.values()), total, sum(lost.values()))

    def rejected(self, name: str) -> list[tuple[str, str, str]]:
        """The bad images of a source so far: key, reason, message."""
        return [row for receipt in self.receipts[name] for row in receipt.rejected]

    def check(self, name: str) -> None:
        """Stop past `max_rejected`, or where nothing is left."""
        rejected, total = self.rejected(name), self.totals[name]
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


def cut(name: str, source: Source, *, keys: Sequence[str] | None, shard_rows: int) -> Shards:
    """The keys of a source, or the chosen ones, sorted and cut into shards.

    Args:
        name: of the source, for messages.
        source: the images.
        keys: which images; all where None.
        shard_rows: images of a shard, at most.

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
    return tuple(tuple(ordered[start : start + shard_rows]) for start in starts)


def digest_of_keys(keys: Sequence[str] | None) -> str:
    """What an address says of the chosen keys: `all`, or a SHA-256 whatever their order."""
    if keys is None:
        return "all"
    return hashlib.sha256("\0".join(sorted(keys)).encode()).hexdigest()


def source_code(source: Source) -> list[Entry]:
    """The code that reads a source's images, for the address of what is made of them.

    A source of another package says in its fingerprint all that decides its images.
    """
    kind = type(source)
    return [kind.read] if kind.__module__.partition(".")[0] in PACKAGES else []


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
