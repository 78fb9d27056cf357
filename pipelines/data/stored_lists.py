"""Lists in JSON files: class names, and what the folders of a data set are called.

A reference is `FILE#KEY`. FILE is looked for where it says, then in `conf/benchmark/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.config import CONF, UserError
from pipelines.data import files
from pipelines.data.limits import LIMITS


def read_list(reference: str) -> list[str]:
    """The list at `FILE#KEY`.

    Raises:
        UserError: where the file is no JSON, or has no such list.
    """
    entries = _read(reference)
    if isinstance(entries, list):
        return [str(entry) for entry in entries]
    raise _missing(reference, "list")


def read_names(reference: str) -> dict[str, str]:
    """Class names by folder name; a list at `FILE#KEY` names the folders 0, 1, ...

    Raises:
        UserError: where the file is no JSON, or has neither a mapping nor a list there.
    """
    entries = _read(reference)
    if isinstance(entries, list):
        entries = dict(enumerate(entries))
    if isinstance(entries, dict):
        return {str(folder): str(name) for folder, name in entries.items()}
    raise _missing(reference, "mapping of folder names to class names")


def _read(reference: str) -> Any:
    file, _, key = reference.partition("#")
    path = next((p for p in (Path(file), CONF / "benchmark" / file) if p.is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(files.read(str(path), LIMITS.text_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON ({error})") from None
    return content.get(key) if isinstance(content, dict) else None


def _missing(reference: str, what: str) -> UserError:
    file, _, key = reference.partition("#")
    return UserError(f"no {what} {key!r} in {file}")
