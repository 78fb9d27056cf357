"""A stage is found when what it gave is there, and the registry is asked, not an old record."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from tests.store.conftest import one_line, pipeline

FOUND = "register        found, nothing to do"


def client(storage: Path) -> mlflow.MlflowClient:
    uri = f"sqlite:///{storage}/mlflow.db"
    return mlflow.MlflowClient(uri, uri)


def model(storage: Path) -> Path:
    (folder,) = (storage / "artifacts" / "models").iterdir()
    return folder / "artifacts"


def champion(storage: Path) -> str:
    return str(client(storage).get_model_version_by_alias("energy-ood", "champion").version)


def delete_files(storage: Path) -> None:
    (model(storage) / "artifacts" / "detector" / "head.safetensors").unlink()


def flip_a_byte(storage: Path) -> None:
    path = model(storage) / "artifacts" / "detector" / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def delete_the_alias(storage: Path) -> None:
    client(storage).delete_registered_model_alias("energy-ood", "champion")


def delete_the_version(storage: Path) -> None:
    client(storage).delete_model_version("energy-ood", "1")


def move_the_alias(storage: Path) -> None:
    made = client(storage).create_model_version("energy-ood", model(storage).as_uri())
    client(storage).set_registered_model_alias("energy-ood", "champion", str(made.version))


def change_the_threshold(storage: Path) -> None:
    client(storage).set_model_version_tag("energy-ood", "1", "threshold", "9.01")


def delete_the_database(storage: Path) -> None:
    (storage / "mlflow.db").unlink()


DAMAGED: dict[Callable[[Path], None], tuple[str, str]] = {
    delete_files: ("files of version 1 are missing or not as they were written", "2"),
    flip_a_byte: ("files of version 1 are missing or not as they were written", "2"),
    delete_the_alias: ("models:/energy-ood@champion is not in the registry", "1"),
    delete_the_version: ("models:/energy-ood@champion is not in the registry", "2"),
    move_the_alias: ("models:/energy-ood@champion is version 2, this run's is 1", "1"),
    change_the_threshold: ("version 1 is not what this run registered", "1"),
    delete_the_database: ("models:/energy-ood@champion is not in the registry", "1"),
}


# The slow matrix has all of them.
FAST = (flip_a_byte, delete_the_alias, change_the_threshold)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(d, marks=[] if d in FAST else [pytest.mark.slow], id=d.__name__)
        for d in DAMAGED
    ],
)
def test_a_model_that_is_not_there_any_more_is_registered_again(
    storage: Path, damage: Callable[[Path], None]
) -> None:
    reason, version = DAMAGED[damage]
    assert FOUND in pipeline(storage).stdout
    damage(storage)
    done = pipeline(storage)
    assert done.returncode == 0, done.stderr
    assert f"register  again: {reason}\n" in done.stdout
    assert f"version {version}\n" in done.stdout
    assert champion(storage) == version
    tags = client(storage).get_model_version("energy-ood", version).tags
    assert tags["threshold"] != "9.01"
    assert FOUND in pipeline(storage).stdout


def test_what_is_printed_at_the_end_is_what_the_registry_holds(storage: Path) -> None:
    (record,) = (storage / "runs").glob("*/register.json")
    content = json.loads(record.read_bytes())
    record.write_text(json.dumps({**content, "model_version": "7"}))
    done = pipeline(storage)
    assert done.returncode == 0, done.stderr
    assert "again: register.json is missing or not as it was written" in done.stdout
    assert "version 1\n" in done.stdout


def test_an_edited_sweep_is_seen_and_never_registered(storage: Path) -> None:
    before = client(storage).get_model_version("energy-ood", "1").tags
    (record,) = (storage / "runs").glob("*/sweep.json")
    text = record.read_text()
    edited = json.loads(text)
    params = edited["methods"]["coop"]["scores"]["mcm"]
    params["tau"] = 100 * params["tau"]
    record.write_text(json.dumps(edited))
    done = pipeline(storage)
    assert done.returncode == 0, done.stderr
    assert "again: sweep.json is missing or not as it was written" in done.stdout
    found = client(storage).get_model_version_by_alias("energy-ood", "champion")
    assert (found.tags["threshold"], found.tags["score.tau"]) == (
        before["threshold"],
        before["score.tau"],
    )
    assert json.loads(record.read_text())["methods"] == json.loads(text)["methods"]


@pytest.mark.parametrize(
    "damage",
    [
        "half",
        pytest.param("garbage", marks=pytest.mark.slow),
        pytest.param("empty", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_database_is_one_line_and_then_made_anew(storage: Path, damage: str) -> None:
    database = storage / "mlflow.db"
    content = database.read_bytes()
    database.write_bytes(
        {"garbage": b"x" * 5000, "half": content[: len(content) // 2 + 100], "empty": b""}[damage]
    )
    line = one_line(pipeline(storage))
    assert f"{database}: the MLflow database cannot be used" in line
    assert "move it away" in line
    database.rename(storage / "away.db")
    done = pipeline(storage)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(database) as found:
        assert found.execute("SELECT count(*) FROM model_versions").fetchone() == (1,)
