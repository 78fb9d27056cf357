"""The tables that stages hand to each other.

| table | columns |
|---|---|
| index (of a source) | key, class_name, domain, split; one row an image, sorted by key |
| features (of a source) | key, feature (float32, unit length), image_hash; sorted by key |
| rejected | key, reason, message |
| scores (of a run) | method, seed, set, key, label, predicted, confidence, score_NAME each |

A `label` is the index of the class in the benchmark's `class_names`, or -1 (`NO_LABEL`) for an
image of none of them. A set's name is its role and, for the last two, the way down:
`train`, `validation`, `test`, `outliers`, `validation_ood/NAME`, `validation_shifted/NAME`,
`shifted/NAME`, `ood/GROUP/NAME`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NO_LABEL = -1

INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("class_name", pa.string()),
        pa.field("domain", pa.string()),
        pa.field("split", pa.string()),
    ]
)

REJECTED = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)


def features_schema(dim: int) -> pa.Schema:
    """The schema of a features table of `dim` columns."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("feature", pa.list_(pa.float32(), dim), nullable=False),
        ]
    )


def features_table(keys: list[str], features: NDArray[np.float32]) -> pa.Table:
    """Keys and their features (N, D) as a table."""
    _, dim = features.shape
    flat = pa.array(np.ascontiguousarray(features, dtype=np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, dim)
    return pa.Table.from_arrays([pa.array(keys, pa.string()), column], schema=features_schema(dim))


def matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A FixedSizeList column as an array (N, D)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(
        len(array), array.type.list_size
    )
