"""Project source read as text: each file's definitions, and the names that they use."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)

# The name under which a module's other statements stand: what runs when it is imported.
BODY = "<module>"
# Decorators that do not call the method they stand over.
_PLAIN = {"property", "cached_property", "classmethod", "staticmethod", "overload"}


@dataclass
class SourceDefinition:
    """One top-level definition or method: what it is, and the names that it uses."""

    source: str
    uses: set[tuple[str, ...]] = field(default_factory=set)  # chains of attributes: a.b.c
    attributes: set[str] = field(default_factory=set)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    methods: dict[str, SourceDefinition] = field(default_factory=dict)
    bases: list[tuple[str, ...]] = field(default_factory=list)  # of a class


@dataclass(frozen=True)
class SourceModule:
    """A parsed file: its definitions by name, and what its imports bind."""

    definitions: Mapping[str, SourceDefinition]
    imports: Mapping[str, tuple[str, str | None]]


@functools.lru_cache(maxsize=1024)
def parse(path: Path, changed: int) -> SourceModule:  # noqa: ARG001
    """The definitions and imports of a file; `changed`, its time, makes an edit be read anew."""
    definitions: dict[str, SourceDefinition] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    body: list[ast.stmt] = []
    tree = _without_docstring(ast.parse(path.read_bytes()))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.update(_imported(node))
        elif named := _defined(node):
            for name, now in named.items():
                before = definitions.get(name)
                definitions[name] = now if before is None else _joined(before, now)
        elif not _is_for_types(node):
            body.append(node)
    if body:
        definitions[BODY] = _definition(body)
        imports.update(definitions[BODY].imports)
        for name in {name for node in body for name in _bound_inside(node)}:
            definitions.setdefault(name, definitions[BODY])
    return SourceModule(definitions, imports)


def _defined(node: ast.stmt) -> dict[str, SourceDefinition]:
    """What a class, a function or an assignment defines."""
    if isinstance(node, ast.ClassDef):
        return {node.name: _class(node)}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name: _definition([node])}
    names = _assigned(node)
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("Table["):
        return dict.fromkeys(names, SourceDefinition("a table of plug-ins"))
    return dict.fromkeys(names, _definition([node])) if names else {}


def _definition(nodes: list[ast.stmt]) -> SourceDefinition:
    result = SourceDefinition("\n".join(ast.unparse(node) for node in nodes))
    for node in nodes:
        _collect(node, result)
    return result


def _class(node: ast.ClassDef) -> SourceDefinition:
    """A class without the methods that are called by name; those stand under `methods`."""
    methods: dict[str, SourceDefinition] = {}
    others: list[ast.stmt] = []
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and _is_by_name(inner):
            before, now = methods.get(inner.name), _definition([inner])
            methods[inner.name] = now if before is None else _joined(before, now)
        else:
            others.append(inner)
    bases = [tuple(ast.unparse(base).partition("[")[0].split(".")) for base in node.bases]
    node.body = others or [ast.Pass()]
    result = _definition([node])
    result.methods, result.bases = methods, bases
    return result


def _is_by_name(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a method runs only where its name is used: no dunder, validator or hook."""
    if node.name.startswith("__"):
        return False
    names = {ast.unparse(d).rpartition(".")[2].partition("(")[0] for d in node.decorator_list}
    return names <= _PLAIN or any(n.endswith("setter") for n in names)


def _joined(first: SourceDefinition, second: SourceDefinition) -> SourceDefinition:
    return SourceDefinition(
        f"{first.source}\n{second.source}",
        first.uses | second.uses,
        first.attributes | second.attributes,
        {**first.imports, **second.imports},
        {**first.methods, **second.methods},
    )


def _collect(node: ast.AST, into: SourceDefinition) -> None:
    """The names, chains of attributes and imports of a piece of code, in one pass."""
    waiting = [node]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, ast.Attribute):
            chain = [inner.attr]
            base = inner.value
            while isinstance(base, ast.Attribute):
                chain.append(base.attr)
                base = base.value
            into.attributes.update(chain)
            if isinstance(base, ast.Name):
                into.uses.add((base.id, *reversed(chain)))
            else:
                waiting.append(base)
            continue
        if isinstance(inner, ast.Name):
            into.uses.add((inner.id,))
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            into.imports.update(_imported(inner))
        for name in inner._fields:
            value = getattr(inner, name, None)
            if isinstance(value, ast.AST):
                waiting.append(value)
            elif isinstance(value, list):
                waiting += [part for part in value if isinstance(part, ast.AST)]


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
    """What an import binds: by local name, the module and the name in it."""
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    tops = ((alias, alias.name.partition(".")[0]) for alias in node.names)
    return {a.asname or top: (a.name if a.asname else top, None) for a, top in tops}


def _assigned(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        return []
    names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return names if all(isinstance(t, ast.Name | ast.Tuple) for t in targets) else []


def _bound_inside(node: ast.stmt) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inner.name
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id


def _is_for_types(node: ast.stmt) -> bool:
    """Whether a statement is for type checkers alone."""
    return (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
    )


def _without_docstring(node: Node) -> Node:
    """The same code without docstrings, which decide nothing."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match inner.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    inner.body = rest or [ast.Pass()]
    return node
