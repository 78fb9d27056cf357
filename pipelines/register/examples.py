"""Training images that a model carries, to say which of them an image that it judges is like.

They decide no verdict. A model holds their keys, classes and features, never their pixels; a
feature takes two bytes a number.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipelines.data.schema import matrix
from pipelines.ood.seeds import generator

if TYPE_CHECKING:  # a model that is loaded needs no benchmark
    from pipelines.data.feature_sets import FeatureSet


@dataclass(frozen=True, eq=False)
class Examples:
    """Training images by key.

    Attributes:
        keys: N keys, as their source names the images.
        labels: (N,) the numbers of their classes.
        features: (N, D) unit length, float16.
    """

    keys: tuple[str, ...]
    labels: NDArray[np.int64]
    features: NDArray[np.float16]

    @classmethod
    def of(cls, images: FeatureSet, per_class: int) -> Examples | None:
        """At most `per_class` images of each class, drawn with a fixed seed; None of none.

        Args:
            images: the training set.
            per_class: 0 keeps none.
        """
        order = torch.randperm(len(images), generator=generator(0)).numpy()
        by_class = order[np.argsort(images.labels[order], kind="stable")]
        _, starts, counts = np.unique(
            images.labels[by_class], return_index=True, return_counts=True
        )
        number_in_class = np.arange(len(by_class)) - np.repeat(starts, counts)
        chosen = np.sort(by_class[number_in_class < per_class])
        if not len(chosen):
            return None
        return cls(
            tuple(images.keys[row] for row in chosen),
            images.labels[chosen],
            unit(images.features[chosen]).astype(np.float16),
        )

    def nearest(
        self, features: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The examples with the largest cosines, the nearest first; of equal ones the earlier.

        Args:
            features: (M, D), of any length above 0.
            count: how many for each; all where there are fewer.

        Returns:
            Their places (M, count) and cosines (M, count).
        """
        cosines = unit(features) @ self.features.astype(np.float32).T
        places = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return places, np.take_along_axis(cosines, places, axis=1)

    def to_bytes(self) -> bytes:
        """The content of a Parquet file: key, label, feature."""
        flat = pa.array(np.ascontiguousarray(self.features).reshape(-1))
        feature = pa.FixedSizeListArray.from_arrays(flat, self.features.shape[1])
        columns = {"key": pa.array(self.keys, pa.string()), "label": self.labels}
        file = io.BytesIO()
        pq.write_table(pa.table({**columns, "feature": feature}), file)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Examples:
        """What `to_bytes` wrote."""
        table = pq.read_table(io.BytesIO(content))
        features = matrix(table["feature"]).astype(np.float16, copy=False)
        return cls(tuple(table["key"].to_pylist()), table["label"].to_numpy(), features)


def unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features (N, D) at unit length; a row of zeros stays as it is."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = features / np.maximum(lengths, np.float32(1e-12))
    return scaled
