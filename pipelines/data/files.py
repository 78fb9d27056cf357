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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from pipelines.config import UserError
from pipelines.data import local_files
from pipelines.data.limits import LIMITS, refuse_bytes
from pipelines.data.local_files import MISSING, File

GIVE_UP_AFTER_S = 30.0  # with gs://, where Arrow's own limit is a quarter of an hour
CREDENTIALS = {
    "s3": "; credentials, region and endpoint: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
    "AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, or ~/.aws",
    "gs": "; credentials: GOOGLE_APPLICATION_CREDENTIALS=FILE, or gcloud's default login",
}
REQUESTS = 16  # to a store at once, of one worker: most of a request is waiting
# What stores call that which changes with the content of a file, the surest first.
CHANGES = (
    "ETag",
    "etag",
    "Content-MD5",
    "Digest",
    "md5Hash",
    "sha",
    "generation",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "modify",
    "updated",
    "created",
)


def is_uri(path: str) -> bool:
    """Whether `path` names a scheme."""
    return "://" in path


def here(path: str) -> Path:
    """A path of this machine, with `~` as the home folder where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~NAME of nobody here
        return Path(path)


def is_folder(path: str) -> bool:
    """Whether there is a folder at `path`."""
    if not is_uri(path):
        return os.path.isdir(here(path))  # noqa: PTH112 - Path's own raises where it may not look
    fs, inner = _filesystem(path)
    if not isinstance(fs, ArrowFSWrapper):
        return bool(fs.isdir(inner))
    with _reachable(path):  # its own isdir says no to a store that does not answer
        return any(info.type == pa.fs.FileType.Directory for info in fs.fs.get_file_info([inner]))


def listing(root: str, suffixes: tuple[str, ...], *, stamped: bool = True) -> list[File]:
    """All files below `root` (or `root` itself) that end in one of `suffixes`, by name.

    Names are matched without regard to case; hidden files and folders are left out.

    Args:
        root: a file, a folder, or its URI.
        suffixes: in lower case.
        stamped: with what changes when the content does; a web server is asked for each file.

    Raises:
        UserError: where there is nothing at `root`, its store cannot be asked or says nothing
            that changes with the content, a folder cannot be read or a link to one leads out of
            `root`, or a name is no UTF-8.
    """

    def wanted(name: str) -> bool:
        return name.lower().endswith(suffixes)

    if is_uri(root):
        listed = [file for file in _remote(root) if wanted(file.name)]
        listed = _stamped(root, listed) if stamped else listed
    else:
        listed = local_files.listing(root, wanted)
    bad = [file.name for file in listed if not _is_utf8(file.name)]
    if bad:
        raise UserError(f"{root}: {len(bad)} names are no UTF-8 (first: {bad[0]}); rename them")
    return sorted(listed)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte that Python keeps as a lone surrogate
        return False
    return True


def stat(root: str, name: str) -> File:
    """The file `name` below `root`; of size -1 where it is missing."""
    path = join(root, name)
    try:
        if not is_uri(root):
            return local_files.describe(name, Path(path))
        fs, inner = _filesystem(path)
        return _remote_file(name, path, fs.info(inner))
    except (OSError, ValueError):
        return File(name, path, MISSING, "")


def stats(root: str, names: Sequence[str]) -> list[File]:
    """`stat` of each of `names`; a store behind a URI is asked for several at once.

    Raises:
        UserError: where a store says nothing that changes with the content.
    """
    if not is_uri(root):
        return [stat(root, name) for name in names]
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(lambda name: stat(root, name), names))
    _refuse_unstamped(root, found)
    return found


def join(root: str, name: str) -> str:
    """The full path or URI of `name` below `root`."""
    if is_uri(root):
        return f"{root.rstrip('/')}/{name}"
    return str(here(root) / name)


def read(path: str, limit: int = LIMITS.image_bytes) -> bytes:
    """The content of a file; OSError where it cannot be read, or has more bytes than `limit`."""
    if not is_uri(path):
        info = Path(path).stat()
        if not stat_module.S_ISREG(info.st_mode):  # a pipe or a device would never end
            raise OSError(errno.EINVAL, "not a regular file", path)
        refuse_bytes(info.st_size, limit)
        return Path(path).read_bytes()
    fs, inner = _filesystem(path)
    with _as_os_error():
        return _fetch(fs, inner, limit)


def open_file(path: str) -> IO[bytes]:
    """A file to seek in and read from; OSError where it cannot be opened.

    From a web server that cannot send parts of a file the whole is fetched.
    """
    if not is_uri(path):
        return Path(path).open("rb")
    fs, inner = _filesystem(path)
    with _as_os_error():
        if path.startswith("http") and not fs.info(inner).get("partial"):
            return io.BytesIO(_fetch(fs, inner, LIMITS.table_bytes))
        file: IO[bytes] = fs.open(inner, "rb")
        return file


def _fetch(fs: Any, inner: str, limit: int) -> bytes:
    """A whole file of a store; its size is asked for first, and a web server not believed."""
    size = fs.info(inner).get("size")
    refuse_bytes(size or 0, limit)
    # By its protocol: fsspec's class for web servers takes a tenth of a second to import.
    if size is not None and "http" not in fs.protocol:
        return bytes(fs.cat_file(inner))
    parts: list[bytes] = []
    with fs.open(inner, "rb", block_size=0, size=size) as stream:
        while part := stream.read(2**20):
            parts.append(part)
            refuse_bytes(sum(map(len, parts)), limit)
    return b"".join(parts)


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
    change = next((str(info[key]) for key in CHANGES if info.get(key)), "")
    return File(name, path, int(info.get("size") or 0), change)


def _stamped(root: str, listed: list[File]) -> list[File]:
    """`listed` with what changes when the content does; a web server's listing lacks it."""
    bare = {file.name for file in listed if not file.change}
    if not bare:
        return listed
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = list(pool.map(lambda f: _asked(f) if f.name in bare else f, listed))
    _refuse_unstamped(root, asked)
    return asked


def _asked(file: File) -> File:
    fs, inner = _filesystem(file.path)
    try:
        return _remote_file(file.name, file.path, fs.info(inner))
    except OSError:
        return File(file.name, file.path, MISSING, "")


def _refuse_unstamped(root: str, listed: Sequence[File]) -> None:
    """Other content under an old address would give old features."""
    bare = [file.name for file in listed if not file.change and file.size != MISSING]
    if bare:
        raise UserError(
            f"{root}: the server gives neither ETag nor Last-Modified for {len(bare)} of "
            f"{len(listed)} files (first: {bare[0]}), so other content there would not be noticed; "
            "download the files and give their folder, or a server that sends one of the two"
        )


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
