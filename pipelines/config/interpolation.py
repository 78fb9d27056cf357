"""`${other.key}` and `${oc.env:NAME,default}` in a configuration, filled in and nothing else.

A file of somebody else's may hold them too, so there is no language here: no other resolver, no
nesting, no cycle, and no text that grows without end from a few that stand for each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_SIZE = 2_000_000  # values and characters that interpolation may make
MAX_CHAIN = 8
_TOKEN = re.compile(r"\$\{([^${}]*)\}")
_KEY = re.compile(r"[^:,.${}\[\]]+(?:\.[^:,.${}\[\]]+)*")
_ENV = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:,(.*))?")
Path = tuple[str | int, ...]


class _Failed(ValueError):
    """Why a text cannot be filled in."""


def text_problem(text: str, *, env: bool) -> str | None:
    """What is wrong with the interpolations of a text; None where nothing is.

    Args:
        text: any text.
        env: whether it may read the environment.
    """
    for inner in _TOKEN.findall(text):
        if _ENV.fullmatch(inner):
            if not env:
                return (
                    f"${{{inner}}} reads an environment variable, which a file of your own does "
                    "only with the word allow_env=true on the command line"
                )
        elif not _KEY.fullmatch(inner):
            return f"{inner!r} in ${{...}}: only ${{other.key}} and ${{oc.env:NAME,default}} exist"
    if "${" in _TOKEN.sub("", text):
        return "${ without its }, or one inside the other"
    return None


def texts_of(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key and the value of every text in plain data; a mapping's keys are texts too."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict):
        for name, inner in data.items():
            yield from texts_of(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for number, inner in enumerate(data):
            yield from texts_of(inner, f"{key}.{number}")


def fill_in(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`data` with everything filled in, and one line for each text that cannot be."""
    work = _Filling(data)
    filled = work.expand(data, ())
    return filled, work.problems


@dataclass
class _Filling:
    data: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    known: dict[Path, tuple[Any, int]] = field(default_factory=dict)
    active: list[Path] = field(default_factory=list)
    size: int = 0

    def expand(self, node: Any, path: Path) -> Any:
        """A node with the texts in it filled in."""
        if isinstance(node, str) and "${" in node:
            return self.text(node, path)
        self.size += 1
        if isinstance(node, dict):
            return {name: self.expand(inner, (*path, name)) for name, inner in node.items()}
        if isinstance(node, list):
            return [self.expand(inner, (*path, number)) for number, inner in enumerate(node)]
        return node

    def text(self, text: str, path: Path) -> Any:
        """A text filled in; "" where that fails, which is told once."""
        before = self.size
        try:
            if path in self.known:
                return self._again(path)
            value = self._filled(text, path)
        except _Failed as failed:
            self.problems.append(f"{'.'.join(map(str, path))}: {failed}")
            value = ""
        self.known[path] = value, self.size - before
        return value

    def _again(self, path: Path) -> Any:
        value, size = self.known[path]
        self._grow(size)
        return value

    def _grow(self, size: int) -> None:
        self.size += size
        if self.size > MAX_SIZE:
            raise _Failed(f"interpolation makes more than {MAX_SIZE:,} values and characters")

    def _filled(self, text: str, path: Path) -> Any:
        if wrong := text_problem(text, env=True):
            raise _Failed(wrong)
        if path in self.active:
            raise _Failed("it stands for itself, by way of others")
        if len(self.active) >= MAX_CHAIN:
            raise _Failed(f"more than {MAX_CHAIN} keys that stand for the next one")
        self.active.append(path)
        try:
            whole = _TOKEN.fullmatch(text)
            if whole:
                return self._value(whole[1])
            parts: list[str] = []
            end = 0
            for token in _TOKEN.finditer(text):
                parts += [text[end : token.start()], self._part(token[1])]
                end = token.end()
            self._grow(len(text))
            return "".join([*parts, text[end:]])
        finally:
            self.active.pop()

    def _part(self, inner: str) -> str:
        value = self._value(inner)
        if isinstance(value, dict | list):
            raise _Failed(f"{inner!r} is no text")
        self._grow(len(str(value)))
        return str(value)

    def _value(self, inner: str) -> Any:
        env = _ENV.fullmatch(inner)
        if env:
            return _from_environment(env[1], env[2])
        return self._looked_up(inner)

    def _looked_up(self, key: str) -> Any:
        node: Any = self.data
        path: Path = ()
        for part in key.split("."):
            if isinstance(node, str) and "${" in node:
                node = self.text(node, path)
            step: str | int = part
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                step = int(part)
            elif not isinstance(node, dict) or part not in node:
                raise _Failed(f"Interpolation key {key!r} not found")
            node, path = node[step], (*path, step)
        if any(inside[: len(path)] == path for inside in self.active):
            raise _Failed("it stands for itself, by way of others")
        if isinstance(node, dict | list):
            if path not in self.known:
                before = self.size
                value = self.expand(node, path)
                self.known[path] = value, self.size - before
                return value
            return self._again(path)
        return self.expand(node, path)


def _from_environment(name: str, default: str | None) -> Any:
    value = os.environ.get(name, default)
    if value is None:
        raise _Failed(f"environment variable {name} is not set")
    if name not in os.environ and value.strip() == "null":
        return None
    if "${" in value or "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise _Failed(f"environment variable {name} holds no plain text")
    return value.strip() if name not in os.environ else value
