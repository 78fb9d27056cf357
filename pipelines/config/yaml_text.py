"""YAML from anywhere into plain data: whatever its text is, the answer is data or one line.

A text may be a bomb: nested until the interpreter's stack ends, a few aliases that stand for a
billion nodes, a number of a million digits. So its events are counted before anything is built,
and what is built holds texts, numbers, true, false and null alone.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf._yaml import get_yaml_loader

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 30
MAX_NODES = 500_000
# What a digest, a JSON file and a Parquet column hold.
MAX_INT = 2**63 - 1
TOO_LARGE = f"an integer of too many digits; at most {MAX_INT} is allowed"
_MERGE = "tag:yaml.org,2002:merge"


class YamlProblem(ValueError):
    """Why a text is no usable YAML, in one line."""


def read_yaml_file(path: Path) -> Any:
    """The plain data in a YAML file.

    Raises:
        FileNotFoundError: where there is none.
        YamlProblem: where it is no file, too large, or no usable YAML.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if path.is_dir():
        raise YamlProblem("a folder; give a file")
    if not path.is_file():  # a pipe or a device, which may never end
        raise YamlProblem("no regular file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise YamlProblem(error.strerror or type(error).__name__) from None
    if len(content) > MAX_BYTES:
        raise YamlProblem(f"more than {MAX_BYTES // 2**20} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = content[error.start]
        raise YamlProblem(f"no UTF-8 text: byte 0x{found:02x} at {error.start}") from None
    return read_yaml(text)


def read_yaml(text: str) -> Any:
    """The plain data in a YAML text; null where it is empty.

    Raises:
        YamlProblem: where it is no usable YAML.
    """
    if not _is_text(text):
        raise YamlProblem("no UTF-8 text")
    try:
        _count(text)
        data = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        told = " ".join((error.problem or error.context or "").split())
        mark = error.problem_mark if "\n" in text.rstrip() else None
        raise YamlProblem(f"{told} (line {mark.line + 1})" if mark else told) from None
    except yaml.YAMLError as error:
        raise YamlProblem(" ".join(str(error).split())) from None
    except (ValueError, ArithmeticError, TypeError, AttributeError, LookupError) as error:
        # A tag that its text does not fit, an integer of more digits than Python converts.
        raise YamlProblem(_of_value(error)) from None
    _check(data)
    return data


def _of_value(error: Exception) -> str:
    if isinstance(error, YamlProblem):
        return str(error)
    if "integer string conversion" in str(error):
        return TOO_LARGE
    return f"a value that its tag does not fit ({' '.join(str(error).split())[:100]})"


@dataclass
class _Size:
    """How large what a text stands for would be, from its events alone."""

    nodes: int = 0
    begun: list[tuple[str | None, int]] = field(default_factory=list)
    anchored: dict[str, int | None] = field(default_factory=dict)

    def take(self, event: yaml.Event) -> None:
        """Count one event."""
        if isinstance(event, yaml.AliasEvent):
            size = self.anchored.get(str(event.anchor), 1)  # the loader says what is missing
            if size is None:
                raise YamlProblem(f"*{event.anchor} stands inside of what it stands for")
            self.nodes += size
        elif isinstance(event, yaml.CollectionStartEvent):
            self.begun.append((event.anchor, self.nodes))
            self.nodes += 1
            self._anchor(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.begun.pop()
            self._anchor(anchor, self.nodes - before)
        elif isinstance(event, yaml.ScalarEvent):
            self.nodes += 1
            self._anchor(event.anchor, 1)

    def _anchor(self, name: str | None, size: int | None) -> None:
        if name is not None:
            self.anchored[name] = size


def _count(text: str) -> None:
    """Refuse a text by its nesting, its size, and what its aliases stand for."""
    size = _Size()
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        size.take(event)
        if len(size.begun) > MAX_DEPTH:
            raise YamlProblem(f"nested more than {MAX_DEPTH} deep")
        if size.nodes > MAX_NODES:
            raise YamlProblem(f"more than {MAX_NODES:,} values, aliases expanded")


@functools.cache
def _loader() -> Any:
    """OmegaConf's loader, which refuses a key that stands twice; here whatever its type is."""

    class Loader(get_yaml_loader(max_yaml_expanded_nodes=MAX_NODES)):  # type: ignore[misc]
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            done = self.__dict__.setdefault("flattened", set())
            if node in done:  # a node that is merged twice has its merged keys by now
                return
            done.add(node)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                    continue
                if key.value in seen:
                    told = f"the key {key.value!r} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                seen.add(key.value)
            super().flatten_mapping(node)

    return Loader


def _check(data: Any) -> None:
    """Refuse what is not plain: dates, sets, bytes, paths, keys that are no text."""
    waiting, seen = [data], set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, dict | list):
            _check_value(value)
        elif id(value) not in seen:  # an alias; it is alive as long as `data` is
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
            for key in value if isinstance(value, dict) else ():
                if not isinstance(key, str | int | float):
                    raise YamlProblem(f"the key {_shown(key)} is no text")
                _check_value(key)


def _check_value(value: Any) -> None:
    if isinstance(value, str):
        if "\0" in value or not _is_text(value):
            raise YamlProblem("a text with a NUL or half a character")
    elif isinstance(value, int):
        if abs(value) > MAX_INT:
            raise YamlProblem(TOO_LARGE)
    elif value is not None and not isinstance(value, float):
        raise YamlProblem(f"a {type(value).__name__} where a text or a number is expected")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def unusual_numbers(data: Any, key: str = "") -> list[str]:
    """One line for each number in plain data that is none: not a number, or infinite."""
    found: list[str] = []
    if isinstance(data, float) and not math.isfinite(data):
        found.append(f"{key}={data!r}: input should be a finite number")
    elif isinstance(data, dict):
        for name, inner in data.items():
            found += unusual_numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for number, inner in enumerate(data):
            found += unusual_numbers(inner, f"{key}.{number}")
    return found
