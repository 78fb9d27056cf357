"""A plug-in is a file that ends in a record of what it gives: `PLUGIN`, found by listing files."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, TypeVar, Union

from pydantic import BeforeValidator, Field

from pipelines.ood.table import Table


class Plugin(Protocol):
    """What every kind of plug-in has."""

    @property
    def Config(self) -> type[Any]:
        """The plug-in's section of the configuration."""


PluginT = TypeVar("PluginT", bound=Plugin)


def discover(package: str, path: list[str], kind: type[PluginT]) -> Table[PluginT]:
    """The plug-ins of a package by the names of their files, sorted.

    Args:
        package: the name of the package.
        path: its `__path__`.
        kind: the class of the record `PLUGIN`; a file without one is no plug-in.
    """
    plugins = {}
    for info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        module = importlib.import_module(f"{package}.{info.name}")
        plugin = vars(module).get("PLUGIN")
        if isinstance(plugin, kind):
            plugins[info.name] = plugin
    return Table(plugins)


def tagged_union(plugins: Mapping[str, Plugin]) -> Any:
    """The pydantic type of any plug-in's `Config`, chosen by `name`.

    A bare name stands for that plug-in with its defaults (`head=linear_probe`).
    """
    configs = tuple(plugin.Config for plugin in plugins.values())
    union = Annotated[Union[configs], Field(discriminator="name")]  # type: ignore[valid-type]  # noqa: UP007
    return Annotated[union, BeforeValidator(_by_name)]


def _by_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value
