"""What the score stage is asked, and what it writes: heads by key, their tables by address."""

from __future__ import annotations

from pydantic import Field

from pipelines.records import HeadKey, HeadRef, Record, StoredRecord


class HeadScores(HeadRef):
    """A trained head, what was fitted for it, and the parameters of the scores that judge by it."""

    # Whole numbers stay whole: DeltaEnergy's c counts classes.
    scores: dict[str, dict[str, int | float]]
    # By score with a pass over the pixels of its own, then by source: the address of its features.
    passes: dict[str, dict[str, str]] = Field(default_factory=dict)


class ScoreTable(StoredRecord):
    """The content of `cache/scores/ADDRESS/manifest.json`, written when every part is there.

    Attributes:
        address: of the table.
        rows: images that are scored.
        parts: its files, and the rows of each.
    """

    address: str
    rows: int
    parts: dict[str, int]


class ScoredHead(Record):
    """The table of one head: its address below `cache/scores/`, and its number of rows."""

    key: HeadKey
    address: str
    rows: int = Field(ge=0)


class ScoreResult(StoredRecord):
    """The content of `score.json`: the table of every head."""

    heads: tuple[ScoredHead, ...]
