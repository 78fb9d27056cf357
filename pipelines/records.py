"""What passes between stages: frozen records, read back by validation, and their common names.

A stage writes one `StoredRecord` as JSON; whoever reads it validates it, so a file of another
layout or a damaged one is refused with its name and never half believed. Records of one stage
stand beside that stage; here are the names that all of them use: sets, scores, heads, margins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.config import UserError

Role: TypeAlias = Literal[
    "train", "validation", "test", "shifted", "ood", "outliers", "validation_ood",
    "validation_shifted",
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)
# Roles that may train or choose something; a test image may do neither.
TRAINING_ROLES: tuple[Role, ...] = (
    "train", "validation", "outliers", "validation_ood", "validation_shifted",
)  # fmt: skip
# Which ID validation images choose: those of the training's own source, or shifted ones too.
Known: TypeAlias = Literal["validation", "full_spectrum"]

Value: TypeAlias = bool | int | float | str | None
# Parameters of a score by name: tau, c, gamma, k.
Params: TypeAlias = Mapping[str, float]


# A name that becomes a part of a path, a column or a line of the terminal.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._,()+-]*")
_NAME_LENGTH = 100


def check_name(text: str, what: str) -> None:
    """Refuse a name that could not stand in a path.

    Args:
        text: the name.
        what: it is the name of, for the message.

    Raises:
        ValueError: where it is no safe name.
    """
    if not _NAME.fullmatch(text) or len(text) > _NAME_LENGTH:
        raise ValueError(
            f"{what} {text!r}: a name is a letter or digit, then letters, digits, "
            f"spaces and . _ , ( ) + -, at most {_NAME_LENGTH} of them"
        )


def printable(text: str) -> str:
    """`text` with whatever could move the cursor or hide something written out, as repr does."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


class Record(BaseModel):
    """A frozen part of what a stage writes; a key that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StoredRecord(Record):
    """A record that is a JSON file of its own; `version` counts the layouts of its class."""

    LAYOUT: ClassVar[int] = 1
    version: int = 0

    @model_validator(mode="before")
    @classmethod
    def _of_this_layout(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        version = data.get("version", cls.LAYOUT)
        if version != cls.LAYOUT:
            raise ValueError(f"layout {version} of {cls.__name__}, this code reads {cls.LAYOUT}")
        return {**data, "version": cls.LAYOUT}

    def to_json(self) -> bytes:
        """The content of its file: sorted keys, one value a line, full digits."""
        data = self.model_dump(mode="json")
        return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, place: str) -> Self:
        """The record that `to_json` wrote.

        Args:
            content: of the file.
            place: its path, for the message.

        Raises:
            UserError: for a damaged file, or one of another layout.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{place}: not a {cls.__name__} of this version ({where or 'file'}: "
                f"{first['msg']}); delete it and give the same command again"
            ) from None


class SetName(Record):
    """The name of a benchmark's set: a role, for OOD sets a group, and a name.

    Written `train`, `shifted/inverted`, `validation_ood/china`, `ood/near/eight`.
    """

    role: Role
    group: str = ""
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> SetName:
        """The parts of a name as it is written.

        Raises:
            ValueError: for an unknown role, or an `ood` set without group or name.
        """
        role, _, rest = text.partition("/")
        if role not in ROLES:
            raise ValueError(f"set {text!r}: a name starts with one of {', '.join(ROLES)}")
        if role != "ood":
            return cls(role=role, name=rest)
        group, _, name = rest.partition("/")
        if not group or not name:
            raise ValueError(f"set {text!r}: an OOD set is written ood/GROUP/NAME")
        return cls(role=role, group=group, name=name)

    def __str__(self) -> str:
        """As it is written."""
        return "/".join(part for part in (self.role, self.group, self.name) if part)

    @property
    def trains(self) -> bool:
        """Whether its images may train or choose something."""
        return self.role in TRAINING_ROLES


class ScoreName(Record):
    """The name of a score: one, or a sum of z-normalised ones written `A+B`."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ScoreName:
        """The parts of a name as it is written."""
        return cls(parts=tuple(text.split("+")))

    def __str__(self) -> str:
        """As it is written."""
        return "+".join(self.parts)

    @property
    def is_sum(self) -> bool:
        """Whether it is a sum."""
        return len(self.parts) > 1


class Margins(Record):
    """The margins of the energy losses, m_in < m_out: ID energies lie low, outliers' high."""

    m_in: float
    m_out: float

    @model_validator(mode="after")
    def _ordered(self) -> Margins:
        if not self.m_in < self.m_out:
            raise ValueError(f"m_in={self.m_in} must be below m_out={self.m_out}")
        return self


class HeadKey(Record):
    """Which trained head of a run: of a method's chosen or default setting, and its seed."""

    method: str
    seed: int
    variant: Literal["chosen", "default"] = "chosen"

    def __str__(self) -> str:
        """For people: `ebm seed 0`, `ebm (default setting) seed 0`."""
        setting = "" if self.variant == "chosen" else " (default setting)"
        return f"{self.method}{setting} seed {self.seed}"


class HeadRef(Record):
    """A trained head, and what was fitted for its scores, by content address."""

    key: HeadKey
    address: str
    fitted: dict[str, str] = Field(default_factory=dict)
