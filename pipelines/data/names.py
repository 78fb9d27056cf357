"""Names of classes and sets that a reader, a path and a table can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.records import Role, SetName, check_name

# Roles of which a benchmark has one set.
ONE_SET: tuple[Role, ...] = ("train", "validation", "test", "outliers")


def refuse_similar(class_names: Sequence[str]) -> None:
    """Refuse class names that say the same to a reader: equal but for case, spaces and `_`.

    Raises:
        ValueError: naming the two; or one that is empty or cannot be printed.
    """
    known: dict[str, str] = {}
    for name in class_names:
        said = plain(name)
        if not said or not name.isprintable():
            raise ValueError(f"class name {name!r}: empty, or it cannot be printed")
        if known.get(said) == name:
            raise ValueError(f"{name} stands there twice")
        if said in known:
            raise ValueError(
                f"the classes {known[said]!r} and {name!r} have one name but for case, spaces "
                "and _; make them one class, or give them names that a reader can tell apart"
            )
        known[said] = name


def plain(class_name: str) -> str:
    """A class name without case, double spaces and `_`."""
    return " ".join(class_name.replace("_", " ").split()).casefold()


def check_set(text: str) -> None:
    """Refuse the name of a set that stages and tables cannot use.

    Raises:
        ValueError: for an unknown role, a part that is no safe name, or one too many.
    """
    name = SetName.parse(text)
    for part in (name.group, name.name):
        if part:
            check_name(part, f"set {text!r}:")
    if name.role in ONE_SET and name.name:
        raise ValueError(f"set {text!r}: there is one set {name.role!r}, without a name below it")
    if name.group == "mean":
        raise ValueError(
            f"set {text!r}: tables call the mean over all groups 'mean'; choose another"
        )
    if str(name) != text:
        raise ValueError(f"set {text!r}: write it {str(name)!r}")
