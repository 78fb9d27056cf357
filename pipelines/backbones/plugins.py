"""A plug-in is a file: the modules of a package that define a `Config`, found by listing it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field


def discover(package: str, path: list[str]) -> dict[str, ModuleType]:
    """The plug-in modules of `package` (its `__path__` is `path`) by name, sorted."""
    found = {}
    for info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        module = importlib.import_module(f"{package}.{info.name}")
        if hasattr(module, "Config"):
            found[info.name] = module
    return found


def tagged_union(modules: Mapping[str, ModuleType]) -> Any:
    """The pydantic type of any plug-in's `Config`, told apart by `name`.

    A bare name stands for that plug-in with its defaults (`head=linear_probe`).
    """
    configs = tuple(module.Config for module in modules.values())
    union = Annotated[Union[configs], Field(discriminator="name")]  # type: ignore[valid-type]  # noqa: UP007
    return Annotated[union, BeforeValidator(_by_name)]


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value
