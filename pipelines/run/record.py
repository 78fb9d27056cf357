"""What a run writes beside the records of its stages."""

from __future__ import annotations

from pipelines.records import StoredRecord


class StageStamp(StoredRecord):
    """What a finished stage came from; written after its record.

    Attributes:
        code: digests of the modules and versions of the libraries that decide it, by name.
        files: digests of the modules' whole files: where they are equal, nothing is parsed.
        inputs: digests of the records of the stages before it, by stage.
        output: digest of its own record.
        beside: digests of the other files that it wrote into the run's folder, by path.
    """

    code: dict[str, str]
    files: dict[str, str]
    inputs: dict[str, str]
    output: str
    beside: dict[str, str]


class MlflowRun(StoredRecord):
    """The content of `mlflow.json`: which MLflow run is that of this run."""

    run_id: str
