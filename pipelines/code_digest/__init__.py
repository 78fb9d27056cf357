"""Which code computed a result: the definitions that can decide it, found from the imports.

A result's address holds `code_of(entries).digest`. The entries are the function that computes the
kind of result and the plug-ins that it uses (a head's module, a score's function). From them every
name is followed through the project's modules, definition by definition:

- A function or a constant is followed where its name is used; so is a class, and of its methods
  those whose name is used as an attribute anywhere on the way, or all where a library's class is
  among its bases, since the library may call them (`forward`).
- A table of plug-ins (an assignment annotated `Table[...]`) is not followed into its rows, and a
  package whose plug-ins are found by listing names none of them: who uses a plug-in passes it as
  an entry. So a new plug-in changes no address of results that do not use it.
- Whatever else a module does at its top level counts as soon as one of its definitions does.

Comments, docstrings and layout do not count. The versions of the libraries that these definitions
import do. Source is read as text, never imported: asking what a stage depends on loads nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from pipelines.code_digest.source import BODY, SourceDefinition, SourceModule, parse

PACKAGES = ("pipelines", "jobs")
ROOT = Path(__file__).resolve().parents[2]

# A function, a class, a module, or the dotted name of one of them.
Entry: TypeAlias = Callable[..., object] | type | ModuleType | str
Definition: TypeAlias = tuple[str, str]  # module and name; of a method `Class.method`


@dataclass(frozen=True)
class Code:
    """The code that can decide a result.

    Attributes:
        modules: by module, a digest of those of its definitions that can decide the result.
        libraries: versions by distribution, Python among them.
        files: by module, a digest of its whole file.
    """

    modules: Mapping[str, str]
    libraries: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Sixteen hex digits; equal exactly where the code and the versions are."""
        return _sha("\n".join(f"{name}={value}" for name, value in self.parts.items()))[:16]

    @property
    def parts(self) -> dict[str, str]:
        """Digests of modules and versions of libraries by name."""
        return {**self.modules, **self.libraries}

    def changes(self, before: Mapping[str, str]) -> list[str]:
        """What is not as it was: modules and libraries by name, sorted.

        Args:
            before: `parts` of the earlier code.
        """
        now = self.parts
        return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


def code_of(*entries: Entry, alone: Sequence[Entry] = (), root: Path | None = None) -> Code:
    """The code that can decide what the entries compute.

    Args:
        entries: where the computation starts, and the plug-ins that it uses.
        alone: functions that only hand the entries what they work on: they count with their own
            text, and are followed within their own module alone.
        root: the folder that holds the project's packages; by default this one.

    Raises:
        ValueError: An entry is no definition of the project.
    """
    names, only = (tuple(sorted(set(map(_name_of, given)))) for given in (entries, alone))
    return _code_of(names, only, root or ROOT)


@functools.lru_cache(maxsize=512)
def _code_of(entries: tuple[str, ...], alone: tuple[str, ...], root: Path) -> Code:
    walk = _Walk(root)
    for entry in entries:
        walk.enter(entry)
    walk.run()
    for entry in alone:
        walk.enter_alone(entry)
    digests = walk.digests()
    return Code(digests, _versions(walk.libraries), {name: walk.file(name) for name in digests})


def is_unchanged(parts: Mapping[str, str], files: Mapping[str, str]) -> bool:
    """Whether earlier code is today's, from whole files and versions: no file is parsed.

    Args:
        parts: of the earlier code.
        files: of the earlier code.
    """
    walk = _Walk(ROOT)
    if any(not walk.exists(module) or walk.file(module) != was for module, was in files.items()):
        return False
    versions = {name: was for name, was in parts.items() if name not in files}
    return all(_version(name) == was for name, was in versions.items())


def _version(name: str) -> str:
    """The version of a distribution or of Python; empty where it is not there."""
    if name == "python":
        return ".".join(map(str, sys.version_info[:2]))
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
    return {name: _version(name) for name in ("python", *sorted(names))}


class _Walk:
    """Follows names from definition to definition until nothing new is reached."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reached: dict[Definition, SourceDefinition] = {}
        self.libraries: set[str] = set()
        self.files: dict[str, Path | None] = {}
        self.parsed: dict[str, SourceModule] = {}
        self.attributes: set[str] = set()
        self.waiting: list[Definition] = []
        # Methods of reached classes that nothing has named so far.
        self.unnamed: dict[str, list[tuple[Definition, SourceDefinition]]] = {}

    def enter(self, entry: str) -> None:
        """Start from a module (all of it) or from one definition."""
        if self.exists(entry):
            self._whole(entry)
            return
        module, _, name = entry.rpartition(".")
        methods: list[str] = []
        while module and not self.exists(module):
            methods.append(name)
            module, _, name = module.rpartition(".")
        if not module or not self._resolve(module, name):
            raise ValueError(f"{entry}: no definition of this project")
        self._name(*methods)

    def enter_alone(self, entry: str) -> None:
        """Reach one definition, and what it names of its own module."""
        module, _, name = entry.rpartition(".")
        definitions, waiting = self._module(module).definitions, [name]
        while waiting:
            name = waiting.pop()
            if name in definitions and (module, name) not in self.reached:
                self.reached[module, name] = definitions[name]
                waiting += [chain[0] for chain in definitions[name].uses]

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

    def file(self, module: str) -> str:
        """A digest of a module's file."""
        path = self.files[module] if self.exists(module) else None
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None else ""

    def exists(self, module: str) -> bool:
        """Whether there is such a module of the project."""
        if module not in self.files:
            base = self.root.joinpath(*module.split("."))
            paths = (base / "__init__.py", base.with_suffix(".py"))
            known = paths if module.partition(".")[0] in PACKAGES else ()
            self.files[module] = next((path for path in known if path.is_file()), None)
        return self.files[module] is not None

    def _module(self, module: str) -> SourceModule:
        if module not in self.parsed:
            path = self.files[module] if self.exists(module) else None
            assert path is not None
            self.parsed[module] = parse(path, path.stat().st_mtime_ns)
        return self.parsed[module]

    def _whole(self, module: str) -> None:
        for name, definition in self._module(module).definitions.items():
            self._reach(module, name)
            self._name(*definition.methods)

    def _reach(self, module: str, name: str) -> None:
        definitions = self._module(module).definitions
        for wanted in (BODY, name):
            if (module, wanted) not in self.reached and wanted in definitions:
                self._add((module, wanted), definitions[wanted])

    def _name(self, *attributes: str) -> None:
        """Reach the waiting methods of these names, now and from now on."""
        for attribute in set(attributes) - self.attributes:
            self.attributes.add(attribute)
            for place, method in self.unnamed.pop(attribute, ()):
                self._add(place, method)

    def _add(self, place: Definition, definition: SourceDefinition) -> None:
        self.reached[place] = definition
        self.waiting.append(place)
        module, name = place
        called = any(self._is_of_a_library(module, base) for base in definition.bases)
        for method, inner in definition.methods.items():
            own = (module, f"{name}.{method}")
            if called or method in self.attributes:
                self._add(own, inner)
            else:
                self.unnamed.setdefault(method, []).append((own, inner))

    def _is_of_a_library(self, module: str, base: tuple[str, ...]) -> bool:
        """Whether a base class, or one of its own bases, is a library's that calls methods."""
        parsed = self._module(module)
        while base and base[0] in parsed.imports:
            target, name = parsed.imports[base[0]]
            if target.partition(".")[0] not in PACKAGES:
                return target.partition(".")[0] not in (*sys.stdlib_module_names, "pydantic")
            base = base[1:] if name is None else (name, *base[1:])
            if self.exists(f"{target}.{base[0]}"):
                target, base = f"{target}.{base[0]}", base[1:]
            module, parsed = target, self._module(target)
        known = parsed.definitions.get(base[0]) if base else None
        return known is not None and any(self._is_of_a_library(module, b) for b in known.bases)

    def _follow(self, module: str, definition: SourceDefinition) -> None:
        self._name(*definition.attributes)
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
        if self.exists(f"{module}.{name}"):
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
        if self.exists(f"{module}.{name}"):
            return self._into(f"{module}.{name}", rest)
        return self._resolve(module, name, *rest)

    def _into(self, module: str, rest: tuple[str, ...]) -> bool:
        """A module by its attribute; one that is handed on as a value counts as a whole."""
        if rest and self._resolve(module, *rest):
            return True
        if not rest:
            self._whole(module)
        return True
