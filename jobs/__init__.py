"""One command per stage: words -> config -> Ray -> stage -> one line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from pipelines.config import Section, UserError, help_text, load

SectionT = TypeVar("SectionT", bound=Section)


def main(job: str, model: type[SectionT], action: Callable[[SectionT], None], about: str) -> None:
    """Run a job: print its help, or load its configuration and act on it.

    A user's mistake is printed without a traceback and ends with exit status 2.
    """
    words = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore")  # libraries' notes to their developers; tests see them
    try:
        if {"--help", "-h"} & set(words):
            rest = [word for word in words if word not in ("--help", "-h")]
            print(help_text(model, job, rest, about))
            return
        action(load(model, job, words))
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
