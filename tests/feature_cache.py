"""A finished feature cache of given rows, one shard, without a backbone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pipelines.data.features import FeatureCache, finish, write_shard
from pipelines.data.storage import Storage


def make_cache(
    storage: Storage, address: str, rows: dict[str, ArrayLike], bad: Sequence[str] = ()
) -> FeatureCache:
    """Features by key; the keys in `bad` were rejected as truncated."""
    every = sorted([*rows, *bad])
    receipt = write_shard(
        storage,
        address,
        shard=0,
        keys=sorted(rows),
        columns={"feature": np.asarray([rows[key] for key in sorted(rows)], dtype=np.float32)},
        rejected=[(key, "truncated", "cut off") for key in bad],
    )
    return finish(storage, address, receipts=[receipt], bounds=[(every[0], every[-1])], about={})
