"""The rules of the house, counted: entries, lines, open dictionaries in signatures."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layers.copies import ROOT

MOST_ENTRIES = 26
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50
MOST_OPEN_DICTIONARIES = 40
OPEN = ("dict", "Dict", "Mapping", "MutableMapping")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    return sorted(path for name in ("pipelines", "jobs") for path in (ROOT / name).rglob("*.py"))


def functions() -> Iterator[tuple[str, Function]]:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def annotations(function: Function) -> Iterator[ast.expr]:
    """Of the arguments and of what is returned."""
    given = function.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    yield from (arg.annotation for arg in all_of_them if arg and arg.annotation)
    if function.returns:
        yield function.returns


def open_dictionaries(annotation: ast.expr) -> list[str]:
    """Each `dict[str, Any]` or `Mapping[str, Any]` in an annotation."""
    return [
        ast.unparse(node)
        for node in ast.walk(annotation)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value).rpartition(".")[2] in OPEN
        and ast.unparse(node.slice).strip("()") == "str, Any"
    ]


def test_one_knows_the_rooms_at_a_glance() -> None:
    entries = sorted(p.name for p in (ROOT / "pipelines").iterdir() if p.name != "__pycache__")
    assert len(entries) <= MOST_ENTRIES, entries


def test_no_file_is_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files()}
    assert {n: lines for n, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE} == {}


def test_no_function_is_long() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {n: lines for n, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}


def test_few_signatures_have_open_dictionaries() -> None:
    found = [
        f"{name}: {text}"
        for name, node in functions()
        for annotation in annotations(node)
        for text in open_dictionaries(annotation)
    ]
    assert len(found) <= MOST_OPEN_DICTIONARIES, "\n".join(found)


@pytest.mark.parametrize(
    ("annotation", "count"),
    [
        ("dict[str, Any]", 1),
        ("Mapping[str, Any] | None", 1),
        ("list[dict[str, typing.Any]]", 0),
        ("Callable[[dict[str, Any]], Mapping[str, Any]]", 2),
        ("dict[str, dict[str, Any]]", 1),
        ("dict[str, float]", 0),
    ],
)
def test_the_count_sees_what_it_should(annotation: str, count: int) -> None:
    assert len(open_dictionaries(ast.parse(annotation, mode="eval").body)) == count
