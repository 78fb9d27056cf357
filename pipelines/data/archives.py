"""Tar archives of images, read in place: nothing is ever unpacked."""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, cast

from pipelines.config import UserError
from pipelines.data import files, images
from pipelines.data.images import Rejected
from pipelines.data.limits import LIMITS, refuse_bytes
from pipelines.data.local_files import File


@dataclass(frozen=True)
class Member:
    """An image in an archive: where its bytes are, or why they cannot be used."""

    name: str
    start: int
    size: int
    problem: Rejected | None = None
    class_name: str | None = None


@functools.lru_cache(maxsize=64)
def members(file: File) -> tuple[Member, ...]:
    """The images of an archive in its order, from one pass over the headers.

    Raises:
        UserError: where a class stands there twice, or a name is no UTF-8.
    """
    members: list[Member] = []
    classes: dict[str, str] = {}
    try:
        with files.open_file(file.path) as opened, _headers(opened) as archive:
            for info in archive:
                _check_name(file, info.name)
                stem = _stem(info.name)
                if info.name.lower().endswith(images.EXTENSIONS):
                    problem = _problem(info)
                    members.append(Member(info.name, info.offset_data, info.size, problem))
                elif info.name == f"{stem}.cls" and info.isreg():
                    if stem in classes:
                        raise UserError(f"{file.path}: the member {info.name} stands there twice")
                    opened.seek(info.offset_data)
                    classes[stem] = opened.read(min(info.size, 1000)).decode().strip()
            opened.seek(archive.offset)
            ended = opened.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError) as error:
        broken = Rejected("truncated", f"the archive cannot be read further ({error})")
        return _with_classes([*members, _rest(members, broken)], classes)
    if not ended:  # a whole archive closes with empty blocks
        members.append(_rest(members, Rejected("truncated", "the archive has no end")))
    return _with_classes(members, classes)


class _Headers:
    """A file of which no more than a header is read at once."""

    def __init__(self, opened: IO[bytes]) -> None:
        """Seek and tell are those of `opened`."""
        self.opened = opened
        self.seek, self.tell = opened.seek, opened.tell

    def read(self, size: int = -1) -> bytes:
        """As the file's own; OSError where a header wants more than `Limits.header_bytes`."""
        refuse_bytes(size, LIMITS.header_bytes)
        return self.opened.read(size)


def _headers(opened: IO[bytes]) -> tarfile.TarFile:
    # No compression: members are read in place, by their offsets in the file.
    return tarfile.open(fileobj=cast("IO[bytes]", _Headers(opened)), mode="r:")


def _check_name(file: File, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{file.path}: the member {name} is named in no UTF-8; rename it") from None


def _rest(members: Sequence[Member], problem: Rejected) -> Member:
    """What stands for the images that a broken archive does not give any more."""
    return Member(f"(after {len(members)} images)", 0, 0, problem)


def _with_classes(members: Sequence[Member], classes: dict[str, str]) -> tuple[Member, ...]:
    return tuple(replace(m, class_name=classes.get(_stem(m.name))) for m in members)


def _stem(name: str) -> str:
    """A member's name up to the first dot of its last part, as WebDataset groups them."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _problem(info: tarfile.TarInfo) -> Rejected | None:
    if not files.is_relative(info.name):
        return Rejected("unsafe_path", "the name leads out of the archive; not read")
    if not info.isreg():
        return Rejected("unsafe_path", "a link or a device, not a file; not followed")
    if info.size > LIMITS.image_bytes:
        return Rejected("too_large", f"{info.size:,} bytes, over {LIMITS.image_bytes:,}")
    return None


def read_members(file: File, places: dict[int, Member]) -> Iterator[tuple[int, bytes | Exception]]:
    """The content of each member, or what stopped its reading, by the slot it is wanted in."""
    try:
        with files.open_file(file.path) as opened:
            for slot, member in sorted(places.items(), key=lambda item: item[1].start):
                opened.seek(member.start)
                content = b"" if member.problem else opened.read(member.size)
                yield slot, member.problem or content
    except OSError as error:
        yield from ((slot, error) for slot in places)
