"""What a full disk, a storage that cannot be written and a broken store say: one line."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.config import UserError
from pipelines.config.secrets import mask, mask_uri
from pipelines.data.kept import Damaged
from pipelines.data.storage import Storage

logger = logging.getLogger(__name__)

_AGAIN = "the same command goes on from here"
_ROOM = f"make room there; {_AGAIN}"
_RIGHTS = f"make it readable and writable; {_AGAIN}"
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOTDIR: "give a folder, storage=FOLDER",
}
# How errors of Ray, and of many files, quote an OSError.
_QUOTED = re.compile(r'\[Errno (\d+)\] ([^\n"]*)')
# Libraries whose errors mean that the MLflow store did not do what it was asked.
_STORE = {"mlflow", "sqlalchemy", "sqlite3", "alembic"}
_LONGEST = 300


@contextmanager
def said_clearly(storage: Storage) -> Iterator[None]:
    """Errors of the file system and of the MLflow store end the block as a `UserError`.

    So does a user's mistake that a process of Ray met. Everything else is a defect, and passes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = explain(error, storage)
        if line is None:
            raise
        logger.debug("%s", line, exc_info=True)
        raise UserError(line) from error


def explain(error: BaseException, storage: Storage) -> str | None:
    """One line on an error that its reader can mend; None for any other."""
    where = f"storage={mask_uri(storage.root)}"
    for inner in _chain(error):
        if isinstance(inner, UserError):
            return str(inner)
        if isinstance(inner, OSError) and inner.errno is not None:
            return _of_system(inner.errno, str(inner), where)
        root = type(inner).__module__.partition(".")[0]
        if root in _STORE:
            return f"MLflow store of {where}: {_one_line(inner)}; {_mend(inner)}"
        is_text = root == "ray" or isinstance(inner, OSError)  # so does shutil's own error
        if is_text and (quoted := _QUOTED.findall(str(inner))):
            number, text = quoted[-1]
            return _of_system(int(number), f"[Errno {number}] {text}", where)
    return (
        f"storage={mask_uri(storage.root)}: {_one_line(error)}"
        if isinstance(error, OSError)
        else None
    )


def damaged_in(error: BaseException) -> Damaged | None:
    """What a process, perhaps one of Ray, found damaged; None where the error is another."""
    return next((inner for inner in _chain(error) if type(inner) is Damaged), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it wraps; Ray names them `cause` and `worker_failures`."""
    waiting, seen = [error], set[int]()
    while waiting:
        inner = waiting.pop(0)
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        wrapped = vars(inner).get("cause"), inner.__cause__
        failures = vars(inner).get("worker_failures") or {}
        waiting += [e for e in (*wrapped, *failures.values()) if isinstance(e, BaseException)]
        yield inner


def _of_system(number: int, text: str, where: str) -> str:
    advice = _ADVICE.get(number, f"mend that; {_AGAIN}")
    text = text.removeprefix(f"[Errno {number}] ")
    return f"{where}: {_one_line(text)}; {advice}"


def _mend(error: BaseException) -> str:
    text = str(error)
    if "disk is full" in text:
        return _ROOM
    if "readonly database" in text or "unable to open database" in text:
        return _RIGHTS
    return f"mend that; {_AGAIN}"


def _one_line(error: object) -> str:
    text = mask(" ".join(str(error).split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
