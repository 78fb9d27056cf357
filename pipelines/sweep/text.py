"""A finished sweep in the terminal: what was chosen, on what, and what failed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

_WIDTH = 110
# Failed trials that are listed with their reason.
_FAILED = 3


def summary(found: Mapping[str, Any]) -> str:
    """The content of `sweep.json` in lines."""
    lines = ["score                accuracy   AUROC     FPR  chosen on validation"]
    for name, method in found["methods"].items():
        lines += [name, *_rows(method)]
    lines += ["", *_wrapped(f"Chosen by: {found['criterion']}.")]
    return "\n".join([*lines, *_counts(found["trials"])])


def _rows(method: Mapping[str, Any]) -> Iterable[str]:
    own = method["setting"]["score"]
    for score, params in method["scores"].items():
        figures = method["validation"].get(score, {})
        cells = [method["accuracy"], figures.get("auroc"), figures.get("fpr")]
        shown = "  ".join(f"{100 * c:6.1f}" if c is not None else f"{'-':>6}" for c in cells)
        mark = "*" if score == own else " "
        yield f"{mark} {score:<18}   {shown}  {words(params) or '-'}"
    if method["chosen"]:
        yield f"  setting: {words(method['chosen'])}"


def _counts(trials: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    listed = list(trials)
    failed = [t for t in listed if t.get("status") == "failed"]
    stopped = sum(t.get("status") == "stopped" for t in listed)
    counts = f"{len(listed)} trials, {stopped} stopped early, {len(failed)} failed"
    yield counts + (":" if failed else ".")
    for trial in failed[:_FAILED]:
        yield from _wrapped(f"  {trial['method']} {words(trial['settings'])}: {trial['reason']}")
    if len(failed) > _FAILED:
        yield f"  and {len(failed) - _FAILED} more in sweep.json"


def words(values: Mapping[str, Any]) -> str:
    """Values as the words of a command line."""
    return ", ".join(f"{key}={'null' if v is None else v}" for key, v in values.items())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
