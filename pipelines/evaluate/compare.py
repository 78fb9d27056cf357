"""Which rows of the tables are compared: the configuration's section `compare` and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.metrics import Comparison, DifferenceMetric, Gain, Step
from pipelines.evaluate.scored import DIFFERENCES, Scored, heads_of, paired_difference
from pipelines.ood import Interval, Resampled
from pipelines.records import HeadKey


def comparisons(
    method: str,
    scores: Sequence[str],
    heads: Sequence[Scored],
    *,
    reference: str | None,
    num_resamples: int,
) -> list[Comparison]:
    """The reference score minus each other score under the same heads, by group of OOD sets."""
    if reference is None or reference not in scores:
        return []
    return [
        Comparison(
            method=method,
            first=reference,
            second=other,
            group=group,
            metric=metric,
            difference=paired_difference(
                [head.resampled(metric, reference, names, num_resamples) for head in heads],
                [head.resampled(metric, other, names, num_resamples) for head in heads],
            ),
        )
        for group, names in heads[0].ood_groups.items()
        for other in scores
        for metric in DIFFERENCES
        if names and other != reference
    ]


def gains(
    compare: CompareConfig,
    scored: Mapping[HeadKey, Scored],
    rows: Sequence[tuple[str, str]],
    num_resamples: int,
) -> tuple[Gain, ...]:
    """What training gained and what the score gained on the way from `start` to `end`.

    Args:
        compare: which names both rows; else, or where one is not in the run, there are no gains.
        scored: of all heads.
        rows: (method, score) of every row of the run.
        num_resamples: of the bootstrap.
    """
    if compare.start is None or compare.end is None:
        return ()
    start = (compare.start.method, compare.start.score)
    end = (compare.end.method, compare.end.score)
    turn = (end[0], start[1])
    if not any(head.ood for head in scored.values()) or not {start, end, turn} <= set(rows):
        return ()

    def judged(metric: DifferenceMetric, method: str, score: str) -> list[Resampled]:
        heads = heads_of(scored, method)
        return [head.resampled(metric, score, head.ood, num_resamples) for head in heads]

    def gained(before: tuple[str, str], after: tuple[str, str]) -> list[Interval]:
        return [
            paired_difference(judged(metric, *after), judged(metric, *before))
            for metric in DIFFERENCES
        ]

    steps: dict[Step, tuple[tuple[str, str], tuple[str, str]]] = {
        "training": (start, turn),
        "score": (turn, end),
        "both": (start, end),
    }
    found = []
    for step, (before, after) in steps.items():
        auroc, fpr = gained(before, after)
        found.append(Gain(step=step, auroc=auroc, fpr=fpr))
    return tuple(found)


def sentence(compare: CompareConfig, found: Sequence[Gain]) -> str:
    """The gains in words; empty where there are none."""
    start, end = compare.start, compare.end
    if start is None or end is None or not found:
        return ""
    said = {gain.step: f"AUROC {points(gain.auroc)}, FPR {points(gain.fpr)}" for gain in found}
    return (
        f"From {start.method} + {start.score} to {end.method} + {end.score}, all OOD images "
        f"pooled, in points with 95 % paired intervals: training ({end.method} for "
        f"{start.method}, {start.score} kept) changed {said['training']}; the score ({end.score} "
        f"for {start.score}, {end.method} kept) changed {said['score']}; together {said['both']}."
    )


def points(difference: Interval) -> str:
    """A difference in percentage points with its interval: +1.2 [+0.3, +2.1]."""
    ends = (difference.value, difference.low, difference.high)
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * end for end in ends))
