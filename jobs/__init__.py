"""One command per stage: words -> config -> Ray -> stage -> one line.

A job names its section by a function, and imports what it runs when it runs it: `--help` and a
wrong word wait for neither Ray nor MLflow, nor, where no plug-in has to judge the word, for torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from jobs import help as job_help
from jobs.stopping import LINE, stoppable
from pipelines.config import ConfigError, Section, UserError, load
from pipelines.config.secrets import MaskingFormatter, mask
from pipelines.records import printable

if TYPE_CHECKING:
    from pipelines.settings.config import PipelineConfig

SectionT = TypeVar("SectionT", bound=Section)
HELP = {"--help", "-h"}


def main(
    job: str,
    section: Callable[[], type[SectionT]],
    action: Callable[[SectionT], None],
    about: str | None,
) -> None:
    """Run a job: print its help, or load its configuration and act on it.

    A user's mistake is printed without a traceback and ends with exit status 2; a job that is
    stopped by Ctrl-C or SIGTERM ends with 130 or 143 and says how to go on.

    Args:
        job: its name, and that of its file in `conf/`.
        section: gives the section of its configuration, importing it only now.
        action: what the job does.
        about: its docstring.
    """
    words = sys.argv[1:]
    _mask_what_is_printed()
    warnings.filterwarnings("ignore")  # libraries' notes to their developers; tests see them
    with stoppable() as stop:
        try:
            if HELP & set(words):
                rest = [word for word in words if word not in HELP]
                print(job_help.text(job, section, rest, about or ""))
            else:
                action(_configuration(job, section, words))
        except UserError as error:
            if stop.number is None:
                problems = error.problems if isinstance(error, ConfigError) else [str(error)]
                for problem in problems:
                    print(f"error: {printable(mask(problem))}", file=sys.stderr)
                sys.exit(2)
        except BaseException:
            if stop.number is None:
                raise
        if stop.number is not None:
            print(LINE, file=sys.stderr)
            sys.exit(128 + stop.number)


def _mask_what_is_printed() -> None:
    """No log line and no traceback of a job shows credentials, whoever wrote it."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(MaskingFormatter("%(message)s"))
    sys.excepthook = _masked_traceback


def _masked_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(mask("".join(traceback.format_exception(kind, error, trace))))


def _configuration(job: str, section: Callable[[], type[SectionT]], words: list[str]) -> SectionT:
    """What the words ask for; a wrong one is refused before any plug-in is imported."""
    if job in job_help.RUN_JOBS:
        from pipelines.settings.words import refuse_wrong_words

        refuse_wrong_words(job, words)
    with seldom_collected():
        return load(section(), job, words)


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage seldom while libraries are imported, which is a sixth of their time.

    They make millions of objects, nearly all of which stay, and Python looks through them again
    and again. Garbage that is young is still found every 10,000 objects.
    """
    before = gc.get_threshold()
    gc.set_threshold(10_000, 50, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_section() -> type[PipelineConfig]:
    """The section of every job that is a part of a run."""
    from pipelines.settings.config import PipelineConfig

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
