"""What the stage finetune writes: trained heads, and what was fitted for their scores."""

from __future__ import annotations

from pydantic import Field, JsonValue

from pipelines.records import HeadKey, HeadRef, Record, StoredRecord


class EnergyModelHistory(Record):
    """How one energy-based model in feature space was trained: its epochs' figures by name."""

    score: str
    seed: int
    address: str
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    seconds: float = 0.0
    history: tuple[dict[str, float], ...]


class HeadTraining(Record):
    """How one head was trained: the epoch that validation chose, and the last epoch's figures.

    Attributes:
        key: of the head.
        best_epoch: 1 .. epochs.
        epochs: that were trained.
        figures: of the last epoch by name: losses, rates, what the method reports.
    """

    key: HeadKey
    best_epoch: int
    epochs: int
    figures: dict[str, float]


class FinetuneResult(StoredRecord):
    """The content of `finetune.json`.

    Attributes:
        heads: of the chosen settings, and of the default ones that they are compared with.
        outlier_counts: outliers that the pretrained model takes for each class, where counted.
        energy_models: the trainings of energy-based models in feature space.
    """

    heads: tuple[HeadRef, ...]
    outlier_counts: tuple[int, ...] | None = None
    energy_models: tuple[EnergyModelHistory, ...] = ()

    def head(self, method: str, seed: int = 0) -> HeadRef:
        """The head of a method's chosen setting."""
        key = HeadKey(method=method, seed=seed)
        return next(head for head in self.heads if head.key == key)
