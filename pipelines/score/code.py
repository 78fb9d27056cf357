"""Which code can decide a table of scores: the stage, the head, and the scores that it uses."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.code_digest import Code, Entry, code_of
from pipelines.ood import FITTED_SCORES, SCORES
from pipelines.score import by_name as scoring
from pipelines.score.judge import judge

# The confidence of every table.
CONFIDENCE = "msp"


def score_rows_used(scores: Iterable[str]) -> list[Entry]:
    """The rows of the tables of scores that these scores, sums included, are computed by."""
    used: list[Entry] = []
    for score in scoring.with_parts(scores):
        if score in SCORES:
            used.append(SCORES[score].function)
        elif score in FITTED_SCORES:
            used.append(FITTED_SCORES[score].record)
        elif score in scoring.TRAINED:
            used.append(scoring.TRAINED[score])
    return used


def score_code(head: str, scores: Iterable[str], *more: Entry) -> Code:
    """The code that can decide what a head's scores are.

    Args:
        head: the name of the head's file.
        scores: their names.
        more: what computes them beside `judge`.
    """
    return code_of(judge, *more, f"pipelines.heads.{head}", *score_rows_used([CONFIDENCE, *scores]))
