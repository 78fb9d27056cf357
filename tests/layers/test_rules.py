"""The rules of the house, counted: entries, lines, open dictionaries in signatures."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from tests.layers.copies import ROOT

MOST_ENTRIES = 27
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50
MOST_OPEN_DICTIONARIES = 40
OPEN = ("dict", "Dict", "Mapping", "MutableMapping")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    return sorted(path for name in ("pipelines", "jobs") for path in (ROOT / name).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def functions_of(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def functions() -> Iterator[tuple[str, Function]]:
    for path in files():
        for node in functions_of(tree_of(path)):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def annotations(function: Function) -> Iterator[ast.expr]:
    """Of the arguments and of what is returned."""
    given = function.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    yield from (arg.annotation for arg in all_of_them if arg and arg.annotation)
    if function.returns:
        yield function.returns


def open_dictionaries(annotation: ast.expr, aliases: Collection[str] = ()) -> list[str]:
    """Each `dict[str, Any]`, `Mapping[str, Any]` or name of one in an annotation."""
    return [
        ast.unparse(node)
        for node in nodes(annotation)
        if (isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in aliases)
        or (isinstance(node, ast.Subscript) and is_open(node))
    ]


def is_open(node: ast.Subscript) -> bool:
    """Whether it is a mapping from names to anything."""
    of = [ast.unparse(part).rpartition(".")[2] for part in getattr(node.slice, "elts", [])]
    return ast.unparse(node.value).rpartition(".")[2] in OPEN and of == ["str", "Any"]


def nodes(annotation: ast.expr) -> Iterator[ast.AST]:
    """All parts of an annotation, those that are quoted too."""
    for node in ast.walk(annotation):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            with contextlib.suppress(SyntaxError, ValueError):  # a text and no type
                yield from nodes(ast.parse(node.value, mode="eval").body)


def assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The names of a module and their values, with and without `TypeAlias`."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value:
            yield ast.unparse(node.target), node.value
        elif isinstance(node, getattr(ast, "TypeAlias", ())):  # `type`, from Python 3.12 on
            yield ast.unparse(node.name), node.value


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a module calls the things of others, and their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield name.asname or name.name, name.name


def aliases(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """The names under which each module can use an open dictionary, itself or through others."""
    known: dict[str, set[str]] = {module: set() for module in trees}
    full: set[str] = set()
    while True:
        for module, tree in trees.items():
            # A name of another's, or of another that is imported whole (`scoring.Records`).
            for name, source in imported(tree):
                ends = {f.removeprefix(source) for f in full if f == source}
                ends |= {f.removeprefix(source) for f in full if f.rpartition(".")[0] == source}
                known[module] |= {name + end for end in ends}
            for name, value in assigned(tree):
                if open_dictionaries(value, known[module]):
                    known[module].add(name)
        found = {f"{module}.{name}" for module, names in known.items() for name in names}
        if found == full:
            return known
        full = found


def found_in(trees: Mapping[str, ast.Module]) -> list[str]:
    """Every open dictionary in a signature."""
    names = aliases(trees)
    return [
        f"{module}:{node.lineno} {node.name}: {text}"
        for module, tree in trees.items()
        for node in functions_of(tree)
        for annotation in annotations(node)
        for text in open_dictionaries(annotation, names[module])
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
    found = found_in({module(path): tree_of(path) for path in files()})
    assert len(found) <= MOST_OPEN_DICTIONARIES, "\n".join(found)


@pytest.mark.parametrize(
    ("annotation", "count"),
    [
        ("dict[str, Any]", 1),
        ("Mapping[str, Any] | None", 1),
        ("list[dict[str, typing.Any]]", 1),
        ("list['dict[str, Any]']", 1),
        ("Callable[[dict[str, Any]], Mapping[str, Any]]", 2),
        ("dict[str, dict[str, Any]]", 1),
        ("dict[str, float]", 0),
    ],
)
def test_the_count_sees_what_it_should(annotation: str, count: int) -> None:
    assert len(open_dictionaries(ast.parse(annotation, mode="eval").body)) == count


A_NAME = "Tree = dict[str, Any]"


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        ({"a": f"{A_NAME}\ndef f(x: Tree) -> list[Tree]: ..."}, 2),
        ({"a": "Tree: TypeAlias = Mapping[str, Any]\ndef f(x: Tree): ..."}, 1),
        ({"a": "Made = Callable[[], list[dict[str, Any]]]\ndef f(x: Made): ..."}, 1),
        ({"a": f"{A_NAME}\nTrees = list[Tree]\ndef f(x: Trees): ..."}, 1),
        ({"a": A_NAME, "b": "from a import Tree\ndef f(x: Tree | None): ..."}, 1),
        ({"a": A_NAME, "b": "from a import Tree as Own\ndef f(x: Own): ..."}, 1),
        ({"p.a": A_NAME, "b": "from p import a\ndef f(x: a.Tree): ..."}, 1),
        ({"p.a": A_NAME, "b": "import p.a\ndef f(x: p.a.Tree): ..."}, 1),
        ({"a": "Tree: TypeAlias = 'dict[str, Any]'\ndef f(x: 'Tree'): ..."}, 1),
        # Through a module between them, whatever the order in which they are read.
        (
            {
                "c": "from b import Tree\ndef f(x: Tree): ...",
                "b": "from a import Tree",
                "a": A_NAME,
            },
            1,
        ),
        # Another name of the same spelling, a closed one, and one that no signature uses.
        ({"a": A_NAME, "b": "class Tree: ...\ndef f(x: Tree): ..."}, 0),
        ({"a": "Arrays = dict[str, float]\ndef f(x: Arrays): ..."}, 0),
        ({"a": f"{A_NAME}\ndef f(): x: Tree = {{}}"}, 0),
    ],
)
def test_the_count_sees_through_names(modules: dict[str, str], count: int) -> None:
    assert len(found_in({name: ast.parse(text) for name, text in modules.items()})) == count
