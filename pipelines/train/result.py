"""A network that was trained, as the stage's record names it."""

from __future__ import annotations

from pipelines.records import HeadKey, Record


class NetworkRef(Record):
    """A trained network and its address below `cache/networks/`."""

    key: HeadKey
    address: str
