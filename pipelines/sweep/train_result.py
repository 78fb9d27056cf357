"""What the stage train writes: the networks, and how their settings were chosen."""

from __future__ import annotations

from pipelines.records import StoredRecord
from pipelines.sweep.result import SweepResult
from pipelines.train.result import NetworkRef


class TrainResult(StoredRecord):
    """The content of `train.json`.

    Attributes:
        networks: of every method that trains one, seed by seed.
        swept: the trials and choices of those whose settings were searched; None: of none.
    """

    networks: tuple[NetworkRef, ...] = ()
    swept: SweepResult | None = None
