"""Where images come from: an index of keys, and their encoded bytes on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa


class Source(Protocol):
    """Images by key; small enough to pickle, so that workers read their own bytes."""

    def fingerprint(self) -> str:
        """A digest that changes when the set of images or their bytes change."""
        ...

    def index(self) -> pa.Table:
        """One row an image, sorted by key, in `pipelines.data.schema.INDEX`."""
        ...

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """The encoded bytes of each key, or what stopped the reading of that one."""
        ...
