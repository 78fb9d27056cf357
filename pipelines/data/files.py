"""Files of a source, on this machine or behind a URI: listing, stamps, bytes.

`s3://` and `gs://` go through pyarrow, which brings their clients along; every other scheme
(`https://`, `file://`, `memory://`, ...) through fsspec.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import os
import stat as stat_module
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from pipelines.config import UserError

Stamp = tuple[str, int, str]  # name, bytes, what changes when the content does
MISSING = -1
GIVE_UP_AFTER_S = 30.0  # with gs://, where Arrow's own limit is a quarter of an hour
CREDENTIALS = {
    "s3": "; credentials, region and endpoint: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
    "AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, or ~/.aws",
    "gs": "; credentials: GOOGLE_APPLICATION_CREDENTIALS=FILE, or gcloud's default login",
}
MAX_BYTES = 2**30  # of an image file on this machine; a larger one is no image


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


def is_uri(path: str) -> bool:
    """Whether `path` names a scheme."""
    return "://" in path


def is_folder(path: str) -> bool:
    """Whether there is a folder at `path`."""
    if not is_uri(path):
        return Path(path).expanduser().is_dir()
    fs, inner = _filesystem(path)
    if not isinstance(fs, ArrowFSWrapper):
        return bool(fs.isdir(inner))
    with _reachable(path):  # its own isdir says no to a store that does not answer
        return any(info.type == pa.fs.FileType.Directory for info in fs.fs.get_file_info([inner]))


def listing(root: str, suffixes: tuple[str, ...]) -> list[File]:
    """All files below `root` (or `root` itself) that end in one of `suffixes`, by name.

    Names are matched without regard to case; hidden files and folders are left out.

    Raises:
        UserError: where there is nothing at `root`, or its store cannot be asked.
    """
    listed = _remote(root) if is_uri(root) else _local(root)
    return sorted(file for file in listed if file.name.lower().endswith(suffixes))


def stat(root: str, name: str) -> File:
    """The file `name` below `root`; of size -1 where it is missing."""
    path = join(root, name)
    try:
        if not is_uri(root):
            return _local_file(name, Path(path))
        fs, inner = _filesystem(path)
        return _remote_file(name, path, fs.info(inner))
    except OSError:
        return File(name, path, MISSING, "")


def join(root: str, name: str) -> str:
    """The full path or URI of `name` below `root`."""
    if is_uri(root):
        return f"{root.rstrip('/')}/{name}"
    return str(Path(root).expanduser() / name)


def read(path: str) -> bytes:
    """The content of a file; OSError where it cannot be read."""
    if not is_uri(path):
        info = Path(path).stat()
        if not stat_module.S_ISREG(info.st_mode):  # a pipe or a device would never end
            raise OSError(errno.EINVAL, "not a regular file", path)
        if info.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"{info.st_size:,} bytes, over {MAX_BYTES:,}", path)
        return Path(path).read_bytes()
    fs, inner = _filesystem(path)
    with _as_os_error():
        return bytes(fs.cat_file(inner))


def open_file(path: str) -> IO[bytes]:
    """A file to seek in and read from; OSError where it cannot be opened.

    From a web server that cannot send parts of a file the whole is fetched.
    """
    if not is_uri(path):
        return Path(path).open("rb")
    fs, inner = _filesystem(path)
    with _as_os_error():
        if path.startswith("http") and not fs.info(inner).get("partial"):
            return io.BytesIO(fs.cat_file(inner))
        file: IO[bytes] = fs.open(inner, "rb")
        return file


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    # Every client has its own error classes, and not all of them are installed here.
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_relative(name: str) -> bool:
    """Whether `name` stays below its source: no absolute path, no drive, no step up (`..`)."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not (
        path.is_absolute() or ".." in path.parts or ":" in path.parts[0]
    )


def _local(root: str) -> list[File]:
    top = Path(root).expanduser()
    if top.is_file():
        return [_local_file(top.name, top)]
    if not top.is_dir():
        raise UserError(f"{root}: no such file or folder")
    listed = []
    for folder, folders, names in os.walk(top, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _leads_back(Path(folder, name), top)
        ]
        for name in names:
            path = Path(folder, name)
            if not name.startswith("."):
                listed.append(_local_or_missing(path.relative_to(top).as_posix(), path))
    return listed


def _leads_back(path: Path, top: Path) -> bool:
    """Whether a link points to a folder that it lies in: following it would never end."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    above = [folder for folder in path.parents if folder == top or top in folder.parents]
    return any(folder.resolve() == target for folder in above)


def _local_or_missing(name: str, path: Path) -> File:
    try:
        return _local_file(name, path)
    except OSError:  # a dangling link: reading it will say so
        return File(name, str(path), MISSING, "")


def _local_file(name: str, path: Path) -> File:
    info = path.stat()
    return File(name, str(path), info.st_size, f"{info.st_mtime_ns} {info.st_ctime_ns}")


@contextlib.contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """A store that cannot be asked is the user's to mend: say which, why, and where to look."""
    try:
        yield
    except (OSError, ImportError, ValueError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:300]
        where = CREDENTIALS.get(uri.partition("://")[0], "")
        raise UserError(f"{uri}: cannot be reached ({why}){where}") from None


def _remote(root: str) -> list[File]:
    fs, inner = _filesystem(root)
    with _reachable(root):
        listed = fs.find(inner, detail=True)
    files = []
    for path, info in sorted(listed.items()):
        name = path[len(inner) :].strip("/") if path.startswith(inner) else path
        single = not name
        name = name or path.rstrip("/").rpartition("/")[2]
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and not is_folder_entry(info):
            files.append(_remote_file(name, root if single else join(root, name), info))
    if not files:
        raise UserError(f"{root}: no file here")
    return files


def is_folder_entry(info: dict[str, Any]) -> bool:
    """Whether a store's answer describes a folder."""
    return info.get("type") == "directory"


def _remote_file(name: str, path: str, info: dict[str, Any]) -> File:
    known = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created")
    change = next((str(info[key]) for key in known if info.get(key)), "")
    return File(name, path, int(info.get("size") or 0), change)


@lru_cache(maxsize=16)
def _by_scheme(scheme: str, host: str) -> Any:
    if scheme == "s3":
        return ArrowFSWrapper(pa.fs.FileSystem.from_uri(f"s3://{host}")[0])
    if scheme == "gs":
        limit = datetime.timedelta(seconds=GIVE_UP_AFTER_S)
        return ArrowFSWrapper(pa.fs.GcsFileSystem(retry_time_limit=limit))
    return fsspec.filesystem(scheme)


def _filesystem(uri: str) -> tuple[Any, str]:
    """The store of a URI and the path inside it."""
    scheme, _, rest = uri.partition("://")
    with _reachable(uri):
        fs = _by_scheme(scheme, rest.partition("/")[0])
    if scheme in ("s3", "gs"):
        return fs, rest.rstrip("/")
    return fs, str(fs._strip_protocol(uri))
