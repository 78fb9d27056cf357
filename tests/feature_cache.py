"""A finished feature cache of given rows, one shard, without a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from pipelines.data.features import FeatureCache, finish, write_shard
from pipelines.data.storage import Storage


def make_cache(
    storage: Storage,
    address: str,
    rows: dict[str, ArrayLike],
    bad: Sequence[str] = (),
    *,
    local: dict[str, ArrayLike] | None = None,
) -> FeatureCache:
    """Features by key, and local features; the keys in `bad` were rejected as truncated."""
    every = sorted([*rows, *bad])
    columns = {"feature": np.asarray([rows[key] for key in sorted(rows)], dtype=np.float32)}
    if local is not None:
        stacked = [local[key] for key in sorted(rows)]
        columns["local_features"] = np.asarray(stacked, dtype=np.float32)
    receipt = write_shard(
        storage,
        address,
        shard=0,
        keys=sorted(rows),
        columns=columns,
        rejected=[(key, "truncated", "cut off") for key in bad],
    )
    return finish(storage, address, receipts=[receipt], bounds=[(every[0], every[-1])], about={})


def flip_a_byte(cache: FeatureCache, value: float, shard: int = 0) -> None:
    """Change the stored `value` of a shard by its last bits: a file that still can be read."""
    path = Path(cache.path(cache.manifest.shards[shard].file))
    content = path.read_bytes()
    place = content.index(np.float32(value).tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
    pq.read_table(path)  # no error says what happened
