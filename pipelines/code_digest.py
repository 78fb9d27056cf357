"""Which code computed a result: the definitions that can decide it, found from the imports.

A result's address holds `code_of(entries).digest`. The entries are the function that computes the
kind of result and the plug-ins that it uses (a head's module, a score's function). From them every
name is followed through the project's modules, definition by definition:

- A function or a constant is followed where its name is used; so is a class, and of its methods
  those whose name is used as an attribute anywhere on the way.
- A table of plug-ins (an assignment annotated `Table[...]`) is not followed into its rows, and a
  package whose plug-ins are found by listing names none of them: who uses a plug-in passes it as
  an entry. So a new plug-in changes no address of results that do not use it.
- Whatever else a module does at its top level counts as soon as one of its definitions does.

Comments, docstrings and layout do not count. The versions of the libraries that these definitions
import do. Source is read as text, never imported: asking what a stage depends on loads nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeAlias, TypeVar

PACKAGES = ("pipelines", "jobs")
ROOT = Path(__file__).resolve().parents[1]
# The name under which a module's other statements stand: what runs when it is imported.
_BODY = "<module>"
# Decorators that do not call the method they stand over.
_PLAIN_DECORATORS = {"property", "cached_property", "classmethod", "staticmethod", "overload"}

# A function, a class, a module, or the dotted name of one of them.
Entry: TypeAlias = Callable[..., object] | type | ModuleType | str
Node = TypeVar("Node", bound=ast.AST)
Definition: TypeAlias = tuple[str, str]  # module and name; of a method `Class.method`


@dataclass(frozen=True)
class Code:
    """The code that can decide a result.

    Attributes:
        modules: by module, a digest of those of its definitions that can decide the result.
        libraries: versions by distribution, Python among them.
    """

    modules: Mapping[str, str]
    libraries: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Sixteen hex digits; equal exactly where the code and the versions are."""
        lines = [f"{k}={v}" for part in (self.modules, self.libraries) for k, v in part.items()]
        return _sha("\n".join(lines))[:16]

    def changes(self, before: Mapping[str, str]) -> list[str]:
        """What is not as it was: modules and libraries by name, sorted.

        Args:
            before: `modules` and `libraries` of the earlier code in one mapping.
        """
        now = {**self.modules, **self.libraries}
        return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


def code_of(*entries: Entry, alone: Sequence[Entry] = (), root: Path = ROOT) -> Code:
    """The code that can decide what the entries compute.

    Args:
        entries: where the computation starts, and the plug-ins that it uses.
        alone: functions that count with their own text, but are not followed: those that only
            hand the entries what they work on.
        root: the folder that holds the project's packages.

    Raises:
        ValueError: An entry is no definition of the project.
    """
    names, only = (tuple(sorted(set(map(_name_of, given)))) for given in (entries, alone))
    return _code_of(names, only, root)


@functools.lru_cache(maxsize=512)
def _code_of(entries: tuple[str, ...], alone: tuple[str, ...], root: Path) -> Code:
    walk = _Walk(root)
    for entry in entries:
        walk.enter(entry)
    walk.run()
    for entry in alone:
        walk.enter(entry)
    return Code(walk.digests(), _versions(walk.libraries))


def _name_of(entry: Entry) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, ModuleType):
        return entry.__name__
    if isinstance(entry, functools.partial):
        return _name_of(entry.func)
    return f"{entry.__module__}.{entry.__qualname__}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions that these top-level packages belong to."""
    names = {d for package in libraries for d in _distributions().get(package, ())}
    python = ".".join(map(str, sys.version_info[:2]))
    found = {name: importlib.metadata.version(name) for name in sorted(names)}
    return {"python": python, **found}


@dataclass
class _Definition:
    """One top-level definition or method: what it is, and the names that it uses."""

    source: str
    uses: set[tuple[str, ...]] = field(default_factory=set)  # chains of attributes: a.b.c
    attributes: set[str] = field(default_factory=set)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    methods: dict[str, _Definition] = field(default_factory=dict)


@dataclass(frozen=True)
class _Module:
    """A parsed file: its definitions by name, and what its imports bind."""

    definitions: Mapping[str, _Definition]
    imports: Mapping[str, tuple[str, str | None]]


class _Walk:
    """Follows names from definition to definition until nothing new is reached."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reached: dict[Definition, _Definition] = {}
        self.libraries: set[str] = set()
        self.files: dict[str, Path | None] = {}
        self.parsed: dict[str, _Module] = {}
        self.attributes: set[str] = set()
        self.waiting: list[Definition] = []
        # Methods of reached classes that nothing has named so far.
        self.unnamed: dict[str, list[tuple[Definition, _Definition]]] = {}

    def enter(self, entry: str) -> None:
        """Start from a module (all of it) or from one definition."""
        if self._exists(entry):
            self._whole(entry)
            return
        parts = entry.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if self._exists(module) and self._resolve(module, parts[cut]):
                self.attributes.update(parts[cut + 1 :])
                return
        raise ValueError(f"{entry}: no definition of this project")

    def run(self) -> None:
        """Follow what waits."""
        while self.waiting:
            module, name = self.waiting.pop()
            self._follow(module, self.reached[module, name])

    def digests(self) -> dict[str, str]:
        """By module, a digest of its reached definitions."""
        parts: dict[str, list[str]] = {}
        for (module, name), definition in sorted(self.reached.items(), key=lambda item: item[0]):
            parts.setdefault(module, []).append(f"{name}\n{definition.source}")
        return {module: _sha("\n".join(texts))[:16] for module, texts in parts.items()}

    def _exists(self, module: str) -> bool:
        if module not in self.files:
            known = module.partition(".")[0] in PACKAGES
            self.files[module] = _file(self.root, module) if known else None
        return self.files[module] is not None

    def _module(self, module: str) -> _Module:
        if module not in self.parsed:
            path = self.files[module] if self._exists(module) else None
            assert path is not None
            self.parsed[module] = _parse(path, path.stat().st_mtime_ns)
        return self.parsed[module]

    def _whole(self, module: str) -> None:
        for name in self._module(module).definitions:
            self._reach(module, name)

    def _reach(self, module: str, name: str) -> None:
        definitions = self._module(module).definitions
        for wanted in (_BODY, name):
            if (module, wanted) not in self.reached and wanted in definitions:
                self._add((module, wanted), definitions[wanted])

    def _add(self, place: Definition, definition: _Definition) -> None:
        self.reached[place] = definition
        self.waiting.append(place)
        module, name = place
        for method, inner in definition.methods.items():
            own = (module, f"{name}.{method}")
            if method in self.attributes:
                self._add(own, inner)
            else:
                self.unnamed.setdefault(method, []).append((own, inner))

    def _follow(self, module: str, definition: _Definition) -> None:
        for attribute in definition.attributes - self.attributes:
            self.attributes.add(attribute)
            for place, method in self.unnamed.pop(attribute, ()):
                self._add(place, method)
        for chain in definition.uses:
            if chain[0] in definition.imports:
                self._bound(definition.imports[chain[0]], chain[1:])
            else:
                self._resolve(module, *chain)

    def _resolve(self, module: str, name: str, *rest: str) -> bool:
        """Reach what `name` means in `module`; whether it means anything of this project."""
        parsed = self._module(module)
        if name in parsed.definitions:
            self._reach(module, name)
            return True
        if name in parsed.imports:
            return self._bound(parsed.imports[name], rest)
        if self._exists(f"{module}.{name}"):
            return self._into(f"{module}.{name}", rest)
        return False

    def _bound(self, target: tuple[str, str | None], rest: tuple[str, ...]) -> bool:
        """Reach what an import binds: a module, or a name of one."""
        module, name = target
        if module.partition(".")[0] not in PACKAGES:
            self.libraries.add(module.partition(".")[0])
            return False
        if name is None:
            return self._into(module, rest)
        if self._exists(f"{module}.{name}"):
            return self._into(f"{module}.{name}", rest)
        return self._resolve(module, name, *rest)

    def _into(self, module: str, rest: tuple[str, ...]) -> bool:
        """A module by its attribute; one that is handed on as a value counts as a whole."""
        if rest and self._resolve(module, *rest):
            return True
        if not rest:
            self._whole(module)
        return True


def _file(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=1024)
def _parse(path: Path, changed: int) -> _Module:  # noqa: ARG001 - read again after an edit
    definitions: dict[str, _Definition] = {}
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
        definitions[_BODY] = _definition(body)
        imports.update(definitions[_BODY].imports)
        for name in {name for node in body for name in _bound_inside(node)}:
            definitions.setdefault(name, definitions[_BODY])
    return _Module(definitions, imports)


def _defined(node: ast.stmt) -> dict[str, _Definition]:
    """What a class, a function or an assignment defines."""
    if isinstance(node, ast.ClassDef):
        return {node.name: _class(node)}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name: _definition([node])}
    if isinstance(node, ast.AnnAssign) and _is_table(node.annotation):
        return dict.fromkeys(_assigned(node), _Definition("a table of plug-ins"))
    names = _assigned(node)
    return dict.fromkeys(names, _definition([node])) if names else {}


def _definition(nodes: list[ast.stmt]) -> _Definition:
    result = _Definition("\n".join(ast.unparse(node) for node in nodes))
    for node in nodes:
        _collect(node, result)
    return result


def _class(node: ast.ClassDef) -> _Definition:
    """A class without the methods that are called by name; those stand under `methods`."""
    own: list[ast.stmt] = []
    methods: dict[str, _Definition] = {}
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and _is_by_name(inner):
            kept = methods.get(inner.name)
            new = _definition([inner])
            methods[inner.name] = new if kept is None else _joined(kept, new)
        else:
            own.append(inner)
    node.body = own or [ast.Pass()]
    result = _definition([node])
    result.methods = methods
    return result


def _is_by_name(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a method runs only where its name is used: no dunder, validator or hook."""
    if node.name.startswith("__"):
        return False
    names = {ast.unparse(d).rpartition(".")[2].partition("(")[0] for d in node.decorator_list}
    return names <= _PLAIN_DECORATORS or any(n.endswith("setter") for n in names)


def _joined(first: _Definition, second: _Definition) -> _Definition:
    return _Definition(
        f"{first.source}\n{second.source}",
        first.uses | second.uses,
        first.attributes | second.attributes,
        {**first.imports, **second.imports},
        {**first.methods, **second.methods},
    )


def _collect(node: ast.AST, into: _Definition) -> None:
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
    return {
        alias.asname or alias.name.partition(".")[0]: (
            alias.name if alias.asname else alias.name.partition(".")[0],
            None,
        )
        for alias in node.names
    }


def _assigned(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    elif sys.version_info >= (3, 12) and isinstance(node, ast.TypeAlias):
        targets = [node.name]
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


def _is_table(annotation: ast.expr) -> bool:
    """Whether an annotation is `Table[...]`."""
    return isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Table"


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
