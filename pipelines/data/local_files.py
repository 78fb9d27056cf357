"""Files below a folder of this machine: each real file once, and nothing outside.

A link to a folder inside is not followed, since that folder is met by its own name; so links
back, crosswise or to themselves add nothing. A link to a file counts where the file it names does
not count itself (`.git/annex/objects/...`), and only the first such link. What lies outside the
folder is not read: a link to a folder there is refused, one to a file there is listed and its
reading says why not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import UserError
from pipelines.data.images import Rejected

MISSING = -1
Stamp = tuple[str, int, str]  # name, bytes, what changes when the content does


@dataclass(frozen=True, order=True)
class File:
    """A file of a source.

    Attributes:
        name: path below the source's root, with `/`; a key, or the beginning of one.
        path: the full path or URI.
        size: bytes; -1 where the file is missing.
        change: times of change on this machine (mtime and ctime in nanoseconds), the entity
            tag or time of change elsewhere.
    """

    name: str
    path: str
    size: int
    change: str

    @property
    def stamp(self) -> Stamp:
        """What a fingerprint is made of."""
        return self.name, self.size, self.change


def listing(root: str, wanted: Callable[[str], bool]) -> list[File]:
    """All files below `root` (or `root` itself) whose name is wanted; hidden ones are left out.

    Raises:
        UserError: where there is nothing, a folder cannot be read, or a link to a folder leads out.
    """
    try:
        top = Path(root).expanduser()
        if top.is_file():
            return [describe(top.name, top)] if wanted(top.name) else []
        if not top.is_dir():
            raise UserError(f"{root}: no such file or folder")
    except (OSError, RuntimeError) as error:
        raise UserError(f"{root}: cannot be read ({error})") from None
    found, links = _walk(root, top, wanted)
    real_top, taken = _real(top), set(found)
    for name, path in sorted(links.items()):
        target = _real(path)
        inside = target.relative_to(real_top).as_posix() if real_top in target.parents else name
        if inside not in taken:
            taken.add(inside)
            found[name] = path
    return [_described(name, path) for name, path in found.items()]


def _walk(
    root: str, top: Path, wanted: Callable[[str], bool]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Real files and links to files by their names."""
    found: dict[str, Path] = {}
    links: dict[str, Path] = {}
    real_top = _real(top)
    for folder, folders, names in os.walk(top, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink() and not _is_within(_real(path), real_top):
                raise UserError(
                    f"{root}: the link {path.relative_to(top)} leads out of it, to {_real(path)}; "
                    "nothing outside is read: give a folder above both, or copy it there"
                )
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if wanted(path.name):
                group = links if path.is_symlink() else found
                group[path.relative_to(top).as_posix()] = path
    return found, links


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: this folder cannot be read ({error.strerror}); its images would be "
        "missing: make it readable, or move it out of the source"
    )


def check_inside(root: str, path: str) -> None:
    """Refuse to read what a link names outside `root`.

    Raises:
        Rejected: as `unsafe_path`.
    """
    if not _is_within(_real(Path(path)), _real(Path(root).expanduser())):
        raise Rejected("unsafe_path", "a link that leads out of the source; not followed")


def _real(path: Path) -> Path:
    """`path` without links; a loop of links stays as it is, and cannot be read."""
    return Path(os.path.realpath(path))


def _is_within(path: Path, top: Path) -> bool:
    return path == top or top in path.parents


def _described(name: str, path: Path) -> File:
    try:
        return describe(name, path)
    except OSError:  # a dangling link: reading it will say so
        return File(name, str(path), MISSING, "")


def describe(name: str, path: Path) -> File:
    """The file at `path` under that name; OSError where it is missing."""
    info = path.stat()
    return File(name, str(path), info.st_size, f"{info.st_mtime_ns} {info.st_ctime_ns}")
