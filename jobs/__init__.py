"""One command per stage: words -> config -> Ray -> stage -> one line.

A job names its section by a function, and imports what it runs when it runs it: `--help` and a
wrong word wait for neither Ray nor MLflow.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from jobs import help as job_help
from pipelines.config import ConfigError, Section, UserError, load
from pipelines.records import printable

if TYPE_CHECKING:
    from pipelines.settings import PipelineConfig

SectionT = TypeVar("SectionT", bound=Section)
HELP = {"--help", "-h"}


def main(
    job: str,
    section: Callable[[], type[SectionT]],
    action: Callable[[SectionT], None],
    about: str | None,
) -> None:
    """Run a job: print its help, or load its configuration and act on it.

    A user's mistake is printed without a traceback and ends with exit status 2.

    Args:
        job: its name, and that of its file in `conf/`.
        section: gives the section of its configuration, importing it only now.
        action: what the job does.
        about: its docstring.
    """
    words = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore")  # libraries' notes to their developers; tests see them
    try:
        if HELP & set(words):
            rest = [word for word in words if word not in HELP]
            print(job_help.text(job, section, rest, about or ""))
            return
        action(load(section(), job, words))
    except UserError as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        for problem in problems:
            print(f"error: {printable(problem)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def run_section() -> type[PipelineConfig]:
    """The section of every job that is a part of a run."""
    from pipelines.settings import PipelineConfig

    return PipelineConfig


def stage_main(stage: str, about: str | None) -> None:
    """Run the job of one stage: from what the stages before it wrote, and say where its own lies.

    Args:
        stage: its name, and the job's.
        about: the job's docstring.
    """

    def action(config: PipelineConfig) -> None:
        from jobs.console import Console
        from pipelines.pipeline import run

        with Console() as console:
            done = run(config, console, only=stage)
        print(f"{stage}: {done.storage.path(*done.place(stage))}")

    main(stage, run_section, action, about)
