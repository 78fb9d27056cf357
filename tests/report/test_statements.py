"""What the page says first: a threshold refuses shifted images, and what keeping them costs."""

from __future__ import annotations

from pipelines.evaluate.metrics import Detection, Metrics, Spread
from pipelines.report.statements import shift, statements
from tests.report.example import Example, build


def accepting(evidence: Example, share: float, **more: object) -> Metrics:
    """The example's metrics with this share of every shifted set accepted by every row."""
    rows = []
    for number, row in enumerate(evidence.metrics.rows):
        tpr = {n: Spread(mean=share if n != "test" else 0.95, std=0) for n in row.tpr}
        cost = Detection(auroc=Spread(mean=0.7, std=0), fpr=Spread(mean=0.9 - number / 100, std=0))
        rows.append(row.model_copy(update={"tpr": tpr, "full_spectrum": cost, **more}))
    return evidence.but(rows=tuple(rows))


def test_a_threshold_that_refuses_shifted_images_is_said_first_with_its_price() -> None:
    metrics = accepting(build(), 0.14)
    best = max(
        (row for row in metrics.rows if row.is_criterion), key=lambda row: row.auroc["mean"].mean
    )
    last, count = metrics.rows[-1], len(metrics.rows)
    (line,) = shift(metrics)
    assert f"detector, {best.method} + {best.score}, accepts only 14.0 % of the shifted" in line
    assert f"under {last.method} + {last.score}: {90 - (count - 1):.1f} % (full" in line
    assert line in statements(metrics)


def test_nothing_is_said_where_they_are_kept_or_there_are_none() -> None:
    evidence = build()
    assert shift(accepting(evidence, 0.5)) == []
    assert shift(accepting(evidence, 0.1, full_spectrum=None)) == []
    plain = [
        row.model_copy(update={"tpr": {"test": row.tpr["test"]}}) for row in evidence.metrics.rows
    ]
    assert shift(evidence.but(rows=tuple(plain))) == []
