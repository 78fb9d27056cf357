"""A small configuration of its own, with groups and methods, for the tests of words and files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipelines import config
from pipelines.config import ConfigError, Section, load


class Plain(Section):
    name: Literal["plain"] = "plain"
    epochs: int = Field(3, ge=1, description="passes")


class Heavy(Section):
    name: Literal["heavy"] = "heavy"
    weight: float = Field(1.0, ge=0, description="of the loss")
    epochs: int = Field(5, ge=1, description="passes")


class Engine(Section):
    address: str = Field("local", description="where")
    workers: int = Field(1, ge=1, description="how many")


class Toy(Section):
    methods: dict[str, Annotated[Plain | Heavy, Field(discriminator="name")]]
    engine: Engine = Engine()
    color: Literal["red", "green"] = Field("red", description="of the toy")
    share: float = Field(0.5, gt=0, le=1, description="a part")
    folder: str = Field(".", description="a place")
    sizes: list[int] = Field([], description="in order")


@pytest.fixture(name="conf")
def conf_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small conf/ of its own."""
    files = {
        "toy.yaml": "methods: [plain, heavy]\nengine: here\ncolor: red\nfolder: ${color}/x\n",
        "child.yaml": "extends: toy\nshare: 0.25\n",
        "engine/here.yaml": "address: here\n",
        "engine/there.yaml": "address: there\nworkers: 4\n",
        "method/plain.yaml": "name: plain\n",
        "method/heavy.yaml": "name: heavy\nweight: 2.0\n",
    }
    for name, content in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    return tmp_path / "conf"


# A few lines that stand for 10**12 values.
BOMB = "\n".join(
    ["a0: &a0 [ha]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)


def read(*words: str, job: str = "toy") -> Toy:
    return load(Toy, job, words)


def problems(*words: str, job: str = "toy") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(*words, job=job)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems
