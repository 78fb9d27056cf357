"""The images of some sets, shard by shard: what a pass over stored features reads.

`FeatureSets.members` makes it, and refuses sets that a view may not open. It holds keys and
labels but no feature, so it is sent to every task of a pass; a task reads one shard and gets the
rows of those sets alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.features import LOCAL, FeatureCache, ShardEntry
from pipelines.data.schema import matrix


@dataclass(frozen=True)
class SourceShard:
    """One feature shard of a source, the unit of work of a pass.

    Attributes:
        source: its name in the benchmark.
        number: of the shard among those of the source.
        entry: its file, rows and checksum.
    """

    source: str
    number: int
    entry: ShardEntry


@dataclass(frozen=True)
class Chosen:
    """The images of one source that are in some set: keys (M,), set numbers and labels (M,)."""

    keys: pa.Array
    sets: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ShardRows:
    """The images of a shard that are in some set, in the order of the shard.

    Attributes:
        keys: (N,) strings.
        sets: (N,) the place of each image's set among `SetMembers.names`.
        labels: (N,) classes, -1 for none.
        features: (N, D) as stored.
        local: (N, P, D) local features, where they were asked for.
    """

    keys: pa.Array
    sets: NDArray[np.int64]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]
    local: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SetMembers:
    """The images of the sets `names`, and where their features lie.

    Attributes:
        names: of the sets.
        chosen: their images by source.
        caches: the features of those sources.
    """

    names: tuple[str, ...]
    chosen: Mapping[str, Chosen]
    caches: Mapping[str, FeatureCache]

    def shards(self) -> list[SourceShard]:
        """Every shard of the sources, source by source, in key order."""
        return [
            SourceShard(source, number, entry)
            for source in self.chosen
            for number, entry in enumerate(self.caches[source].manifest.shards)
        ]

    def num_rows(self) -> int:
        """How many images have a feature: all of them but the rejected ones."""
        return sum(len(known.keys) - self._rejected(s) for s, known in self.chosen.items())

    def read(self, shard: SourceShard, *, local: bool = False) -> ShardRows:
        """The rows of these sets in one shard, whose bytes are checked.

        Args:
            shard: one of `shards`.
            local: with local features.

        Raises:
            UserError: where the shard's bytes are not those that were written, or the images
                were embedded without local features.
        """
        known, cache = self.chosen[shard.source], self.caches[shard.source]
        table = cache.read_shard(shard.entry, ["feature", *([LOCAL] if local else [])])
        place = pc.index_in(table["key"], value_set=known.keys).combine_chunks()
        rows = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
        members = place.take(pa.array(rows)).to_numpy(zero_copy_only=False).astype(np.int64)
        features = matrix(table["feature"])[rows]
        return ShardRows(
            table["key"].combine_chunks().take(pa.array(rows)),
            known.sets[members],
            known.labels[members],
            features,
            matrix(table[LOCAL])[rows].reshape(len(rows), -1, features.shape[1]) if local else None,
        )

    def _rejected(self, source: str) -> int:
        """How many of a source's images have no feature."""
        lost = self.caches[source].rejected()["key"]
        return int(pc.sum(pc.is_in(self.chosen[source].keys, value_set=lost)).as_py() or 0)
