"""Files under one root, on this machine or behind a URI, written whole or not at all.

storage/cache/KIND/ADDRESS/              at the address of what decides it
storage/runs/RUN/                        what one resolved configuration gave
storage/mlflow.db, storage/artifacts/    the default MLflow store
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import UserError


@dataclass(frozen=True)
class Storage:
    """A folder named by an absolute path or an fsspec URI (`s3://...`); cheap to pickle."""

    root: str

    @classmethod
    def open(cls, root: str) -> Storage:
        """Resolve `root`; a relative path means below the working directory.

        Raises:
            UserError: for a relative path inside a submitted Ray job, whose working
                directory is thrown away when the job ends, and for a URI whose client is missing.
        """
        root = root.removeprefix("file://")  # a folder of this machine, written as one
        if "://" in root:
            _check_client(root.partition("://")[0])
            return cls(root.rstrip("/"))
        path = Path(root).expanduser()
        if not path.is_absolute() and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            raise UserError(
                f"storage={root!r}: a submitted Ray job runs in a folder that is thrown away; "
                "give an absolute path or a URI, for example storage=/data/energy-ood"
            )
        return cls(str(path.resolve()))

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine (or mounted on it)."""
        return "://" not in self.root

    def path(self, *parts: str) -> str:
        """The full path or URI of a file below the root."""
        return "/".join((self.root, *parts))

    def local(self, *parts: str) -> Path:
        """The path of a file below a local root.

        Raises:
            UserError: where the root is a URI.
        """
        if not self.is_local:
            raise UserError(f"storage={self.root}: this needs a folder of this machine")
        return Path(self.path(*parts))

    def _fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.root)[0]

    def exists(self, *parts: str) -> bool:
        """Whether that file or folder is there."""
        return bool(self._fs().exists(self.path(*parts)))

    def names(self, *parts: str) -> list[str]:
        """The names in a folder, sorted; none where the folder is missing."""
        fs, path = self._fs(), self.path(*parts)
        fs.invalidate_cache()
        if not fs.isdir(path):
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False))

    def read_bytes(self, *parts: str) -> bytes:
        """The content of a file."""
        return bytes(self._fs().cat_file(self.path(*parts)))

    def size_and_sha256(self, *parts: str) -> tuple[int, str]:
        """The size of a file and the SHA-256 of its content, which is never held as a whole."""
        sha, size = hashlib.sha256(), 0
        with self._fs().open(self.path(*parts), "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
                size += len(block)
        return size, sha.hexdigest()

    def fetch(self, target: Path, *parts: str) -> None:
        """Copy a file to a path of this machine, never held in memory as a whole.

        Raises:
            FileNotFoundError: where there is no such file.
        """
        self._fs().get_file(self.path(*parts), str(target))

    def remove(self, *parts: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._fs().rm(self.path(*parts), recursive=True)

    def write_bytes(self, content: bytes, *parts: str) -> None:
        """Write a file so that a reader sees all of it or none, also after a crash."""
        with self.writing(*parts) as path, path.open("wb") as file:
            file.write(content)

    @contextmanager
    def writing(self, *parts: str, replace: bool = True) -> Iterator[Path]:
        """A local path to write to; on success it is flushed and takes its name at once.

        Object stores show an upload only when it is complete, so there the finished local
        file is uploaded under its final name. With `replace=False` a file that is already
        there stays, also when two write at once: the first wins.
        """
        target = self.path(*parts)
        if self.is_local:
            final = Path(target)
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                yield temporary
                _flush(temporary)
                if replace or not _link(temporary, final):
                    temporary.replace(final)
            finally:
                temporary.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / parts[-1]
            yield temporary
            fs = self._fs()
            if not replace and fs.exists(target):
                return
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(temporary), target)

    def read_json(self, *parts: str) -> Any:
        """The content of a JSON file."""
        return json.loads(self.read_bytes(*parts))

    def write_json(self, content: Any, *parts: str) -> None:
        """Write JSON (sorted keys, one value a line), whole or not at all."""
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        self.write_bytes((text + "\n").encode(), *parts)

    def read_table(self, *parts: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file."""
        with self._fs().open(self.path(*parts), "rb") as file:
            return pq.read_table(file, columns=columns)

    def write_table(self, table: pa.Table, *parts: str) -> None:
        """Write a Parquet file, whole or not at all."""
        with self.writing(*parts) as path:
            pq.write_table(table, path)


def _check_client(scheme: str) -> None:
    """Refuse a scheme whose client is not installed, before any work."""
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(scheme)
        mend = "give a folder, or a URI that fsspec knows"
        if package:
            mend = (
                f"its client {package} is not among the locked packages: uv pip install "
                f"{package}=={fsspec.__version__} here and on every node, or give a mounted folder"
            )
        raise UserError(f"storage={scheme}://: {error}; {mend}") from None


def _link(source: Path, target: Path) -> bool:
    """Give `source` a second name, unless that is taken; False where links are not possible."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return True
    except OSError:
        return target.exists()
    return True


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
