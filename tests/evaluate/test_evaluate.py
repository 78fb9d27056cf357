"""Figures of synthetic score tables with two seeds, against scikit-learn and plain loops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.stats import binom
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pipelines.config import UserError
from pipelines.evaluate import stage as evaluate
from pipelines.evaluate.config import CompareConfig, EvaluateConfig, ThresholdConfig
from pipelines.evaluate.metrics import Facts, Interval, MetricRow, Metrics, Spread
from pipelines.evaluate.stage import Evaluation
from pipelines.methods import METHODS as PLUGINS
from pipelines.methods import MethodConfig
from pipelines.records import HeadKey

SETS = {  # number of images, mean score
    "validation": (120, 2.0),
    "test": (200, 2.0),
    "validation_ood/v": (50, 0.5),
    "shifted/a": (80, 1.5),
    "shifted/b": (60, 1.0),
    "ood/near/p": (70, 1.2),
    "ood/near/q": (30, 0.6),
    "ood/far/r": (90, -0.5),
}
METHODS = ("coop", "ebm")
SCORES = ("mcm", "delta_energy")
SEEDS = (0, 1)
FACTS = Facts(benchmark="toy", backbone="none", notes="made up")
COMPARE = CompareConfig.model_validate(
    {
        "reference": "delta_energy",
        "start": {"method": "coop", "score": "mcm", "label": "where it starts"},
        "end": {"method": "ebm", "score": "delta_energy", "label": "where it ends"},
    }
)
SETTINGS = EvaluateConfig(num_resamples=200)
QUANTILE = ThresholdConfig()


def table(seed: int, sets: dict[str, tuple[int, float]]) -> pa.Table:
    """Scores of normal noise, rounded so that some tie."""
    random = np.random.default_rng(seed)
    parts = []
    for name, (size, mean) in sets.items():
        known = not name.startswith(("ood", "validation_ood"))
        label = random.integers(4, size=size) if known else np.full(size, -1)
        wrong = random.random(size) < 0.2
        parts.append(
            pa.table(
                {
                    "set": [name] * size,
                    "key": [f"{name}/{n}" for n in range(size)],
                    "label": pa.array(label, pa.int64()),
                    "predicted": pa.array(np.where(wrong, (label + 1) % 4, label), pa.int64()),
                    "confidence": random.uniform(0.25, 1, size),
                    "score_mcm": np.round(random.normal(mean, 1, size), 2),
                    "score_delta_energy": np.round(random.normal(1.3 * mean, 1, size), 2),
                }
            )
        )
    return pa.concat_tables(parts)


Tables = dict[HeadKey, pa.Table]


def tables(sets: dict[str, tuple[int, float]] = SETS) -> Tables:
    return {
        HeadKey(method=method, seed=seed): table(10 * number + seed, sets)
        for number, method in enumerate(METHODS)
        for seed in SEEDS
    }


@dataclass(frozen=True)
class Chosen:
    """What validation chose of a method."""

    setting: MethodConfig
    scores: dict[str, dict[str, float]]
    chosen: dict[str, Any] = field(default_factory=dict)


def run(
    data: Tables,
    scores: tuple[str, ...] = SCORES,
    *,
    target_tpr: float = 0.95,
    settings: EvaluateConfig = SETTINGS,
    compare: CompareConfig = COMPARE,
    threshold: ThresholdConfig = QUANTILE,
) -> Metrics:
    params: dict[str, dict[str, float]] = {score: {"tau": 0.5} for score in scores}
    choices = {m: Chosen(PLUGINS[m].Config(), params) for m in METHODS}
    evaluation = Evaluation(
        facts=FACTS, criterion="made up", choices=choices, target_tpr=target_tpr,
        settings=settings, compare=compare, threshold=threshold,
    )  # fmt: skip
    return evaluate.run(data, evaluation)


@pytest.fixture(scope="module")
def data() -> Tables:
    return tables()


@pytest.fixture(scope="module")
def metrics(data: Tables) -> Metrics:
    return run(data)


def column(found: pa.Table, names: str | list[str], name: str) -> NDArray[Any]:
    wanted = [names] if isinstance(names, str) else names
    rows = [row[name] for row in found.to_pylist() if row["set"] in wanted]
    assert rows
    return np.asarray(rows)


def auroc(known: NDArray[Any], other: NDArray[Any]) -> float:
    truth = np.r_[np.ones(len(known)), np.zeros(len(other))]
    return float(roc_auc_score(truth, np.r_[known, other]))


def fpr(known: NDArray[Any], other: NDArray[Any], target: float = 0.95) -> float:
    truth = np.r_[np.ones(len(known)), np.zeros(len(other))]
    false, true, _ = roc_curve(truth, np.r_[known, other], drop_intermediate=False)
    return float(false[np.argmax(true >= target)])


def is_over_seeds(found: Spread, values: list[float]) -> bool:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return (found.mean, found.std) == pytest.approx((mean, variance**0.5), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", SCORES)
class TestRow:
    @pytest.fixture
    def row(self, metrics: Metrics, method: str, score: str) -> MetricRow:
        return metrics.row(method, score)

    @pytest.fixture
    def seeds(self, data: Tables, method: str) -> list[pa.Table]:
        return [data[HeadKey(method=method, seed=seed)] for seed in SEEDS]

    def test_accuracy(self, row: MetricRow, seeds: list[pa.Table]) -> None:
        def accuracy(part: pa.Table, name: str) -> float:
            return float(np.mean(column(part, name, "label") == column(part, name, "predicted")))

        assert is_over_seeds(row.id_accuracy, [accuracy(s, "test") for s in seeds])
        for name in ("shifted/a", "shifted/b"):
            assert is_over_seeds(row.shifted[name], [accuracy(s, name) for s in seeds])
        # The shifted sets count equally, whatever their size.
        means = [(accuracy(s, "shifted/a") + accuracy(s, "shifted/b")) / 2 for s in seeds]
        assert is_over_seeds(row.ood_accuracy, means)

    def test_each_set_and_the_unweighted_groups(
        self, row: MetricRow, seeds: list[pa.Table], score: str
    ) -> None:
        name = f"score_{score}"
        ood = {"near": ["ood/near/p", "ood/near/q"], "far": ["ood/far/r"]}
        ood["mean"] = [*ood["near"], *ood["far"]]
        functions = {
            "auroc": auroc,
            "fpr": fpr,
            "fpr_ood": lambda a, b: fpr(-b, -a),
            "aupr_id": lambda a, b: average_precision_score(
                np.r_[np.ones(len(a)), np.zeros(len(b))], np.r_[a, b]
            ),
            "aupr_ood": lambda a, b: average_precision_score(
                np.r_[np.zeros(len(a)), np.ones(len(b))], -np.r_[a, b]
            ),
        }
        for figure, function in functions.items():
            values = {
                n: [function(column(s, "test", name), column(s, n, name)) for s in seeds]
                for n in ood["mean"]
            }
            for set_name, per_seed in values.items():
                assert is_over_seeds(getattr(row.sets[set_name], figure), per_seed)
            by_group = getattr(row, figure)
            assert set(by_group) == {"near", "far", "mean"}
            for group, names in ood.items():
                means = [float(np.mean([values[n][k] for n in names])) for k in range(len(SEEDS))]
                assert is_over_seeds(by_group[group], means)

    def test_full_spectrum_counts_shifted_images_as_id(
        self, row: MetricRow, seeds: list[pa.Table], score: str
    ) -> None:
        name, known = f"score_{score}", ["test", "shifted/a", "shifted/b"]
        ood = ["ood/near/p", "ood/near/q", "ood/far/r"]
        for figure, function in {"auroc": auroc, "fpr": fpr}.items():
            expected = [
                float(np.mean([function(column(s, known, name), column(s, n, name)) for n in ood]))
                for s in seeds
            ]
            assert row.full_spectrum is not None
            assert is_over_seeds(getattr(row.full_spectrum, figure), expected)

    def test_the_threshold_is_set_on_validation_and_judged_on_test(
        self, row: MetricRow, seeds: list[pa.Table], score: str
    ) -> None:
        name = f"score_{score}"

        def threshold(part: pa.Table) -> float:
            values = column(part, "validation", name)
            return float(max(v for v in values if np.mean(values >= v) >= 0.95))

        assert row.threshold.value == threshold(seeds[0])
        assert row.threshold.num_images == 120
        for set_name in ("test", "shifted/a", "shifted/b"):
            shares = [float(np.mean(column(s, set_name, name) >= threshold(s))) for s in seeds]
            assert is_over_seeds(row.tpr[set_name], shares)
        shares = [float(np.mean(column(s, "ood/far/r", name) >= threshold(s))) for s in seeds]
        assert is_over_seeds(row.validation_fpr["ood/far/r"], shares)

    def test_calibration_error(self, row: MetricRow, seeds: list[pa.Table]) -> None:
        def error(part: pa.Table) -> float:
            confidence = column(part, "test", "confidence")
            right = column(part, "test", "label") == column(part, "test", "predicted")
            total = 0.0
            for k in range(15):
                inside = [i for i, c in enumerate(confidence) if k / 15 < c <= (k + 1) / 15]
                if inside:
                    gap = np.mean(right[inside]) - np.mean(confidence[inside])
                    total += abs(gap) * len(inside) / len(confidence)
            return float(total)

        assert is_over_seeds(row.ece, [error(s) for s in seeds])

    def test_risk_and_coverage(self, row: MetricRow, seeds: list[pa.Table], score: str) -> None:
        """By a loop over thresholds; equal scores are accepted together."""

        def areas(part: pa.Table) -> tuple[float, float]:
            scores = column(part, "test", f"score_{score}")
            wrong = column(part, "test", "label") != column(part, "test", "predicted")
            risks: list[float] = []
            area, before = 0.0, 0.0
            for value in np.unique(scores)[::-1]:
                accepted = scores >= value
                risks += [float(wrong[accepted].mean())] * int((scores == value).sum())
                # A trapezoid: the generalised risk over the share of accepted images.
                after = float((wrong & accepted).mean())
                area += (before + after) / 2 * float((scores == value).mean())
                before = after
            return float(np.mean(risks)), area

        assert is_over_seeds(row.aurc, [areas(s)[0] for s in seeds])
        assert is_over_seeds(row.augrc, [areas(s)[1] for s in seeds])


def test_a_conformal_threshold_is_a_lower_score(data: Tables) -> None:
    """floor(0.05 * 121) = 6: the sixth smallest of 120, where the quantile takes the seventh."""
    values = np.sort(column(data[HeadKey(method="coop", seed=0)], "validation", "score_mcm"))
    found = run(data, threshold=ThresholdConfig(rule="conformal")).rows[0].threshold
    assert (found.value, found.rule) == (values[5], "conformal")
    assert run(data).rows[0].threshold.value == values[6]


def test_a_threshold_of_the_full_spectrum_is_set_on_shifted_validation_too() -> None:
    sets = {**SETS, "validation_shifted/a": (80, 1.0), "validation_shifted/b": (40, 0.0)}
    shifted = tables(sets)
    part = shifted[HeadKey(method="coop", seed=0)]
    names = ["validation", "validation_shifted/a", "validation_shifted/b"]
    values = np.sort(np.concatenate([column(part, name, "score_mcm") for name in names]))
    row = run(shifted, threshold=ThresholdConfig(known="full_spectrum")).rows[0]
    # Of 240 images 228 are accepted: the thirteenth from below.
    assert (row.threshold.value, row.threshold.num_images) == (values[12], 240)
    assert "95 % of 240 ID and shifted validation images" in row.threshold.meant_for(0.95)
    shares = []
    for seed in SEEDS:
        other = shifted[HeadKey(method="coop", seed=seed)]
        cut = np.sort(np.concatenate([column(other, name, "score_mcm") for name in names]))[12]
        shares.append(float(np.mean(column(other, "shifted/a", "score_mcm") >= cut)))
    assert is_over_seeds(row.tpr["shifted/a"], shares)
    # Sets that are there and not asked for change nothing.
    plain = run(shifted).rows[0]
    assert plain.threshold.value == np.sort(column(part, "validation", "score_mcm"))[6]
    assert plain.threshold.num_images == 120


def test_too_few_images_for_the_promise_are_one_line(data: Tables) -> None:
    with pytest.raises(UserError) as error:
        run(data, target_tpr=0.995, threshold=ThresholdConfig(rule="conformal"))
    assert "120 ID images are too few" in str(error.value)
    assert "conformal needs 199; or take threshold.rule=quantile" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_thresholds_interval_is_that_of_the_bootstrap() -> None:
    size, target = 200, 0.95
    values = np.sort(np.random.default_rng(5).normal(size=size))
    settings = EvaluateConfig(num_resamples=4000)
    part = table(0, {n: s for n, s in SETS.items() if n != "validation"})
    added = pa.table(
        {
            "set": ["validation"] * size,
            "key": [str(n) for n in range(size)],
            "label": np.zeros(size, np.int64),
            "predicted": np.zeros(size, np.int64),
            "confidence": np.full(size, 0.5),
            "score_mcm": values,
            "score_delta_energy": values,
        }
    )
    heads = {HeadKey(method="coop", seed=0): pa.concat_tables([part, added])}
    found = run(heads, target_tpr=target, settings=settings).rows[0].threshold
    # The threshold is the 11th smallest of 200. In a resample it is at most the j-th smallest
    # where at least 11 of 200 draws fall among the j smallest: a binomial probability.
    rank = size - round(target * size) + 1
    below = np.array([binom.sf(rank - 1, size, j / size) for j in range(1, size + 1)])
    low, high = (int(np.argmax(below >= q)) for q in (0.025, 0.975))
    assert found.value == values[rank - 1]
    assert values[low - 1] <= found.low <= values[low + 1]
    assert values[high - 1] <= found.high <= values[high + 1]


class TestComparisons:
    def test_delta_energy_minus_each_other_score_by_group(
        self, metrics: Metrics, data: Tables
    ) -> None:
        groups = {
            "near": ["ood/near/p", "ood/near/q"],
            "far": ["ood/far/r"],
            "mean": ["ood/near/p", "ood/near/q", "ood/far/r"],
        }
        found = {(p.method, p.group, str(p.metric)): p for p in metrics.comparisons}
        assert len(found) == len(metrics.comparisons) == 2 * 3 * 2
        for (method, group, metric), pair in found.items():
            assert (pair.first, pair.second) == ("delta_energy", "mcm")
            function = {"auroc": auroc, "fpr": fpr}[metric]
            differences = []
            for seed in SEEDS:
                part = data[HeadKey(method=method, seed=seed)]
                values = [
                    function(column(part, "test", n), column(part, groups[group], n))
                    for n in ("score_delta_energy", "score_mcm")
                ]
                differences.append(values[0] - values[1])
            difference = pair.difference
            assert difference.value == pytest.approx(np.mean(differences), abs=1e-12)
            assert difference.low <= difference.value <= difference.high

    def test_what_training_gained_and_what_the_score_gained(
        self, metrics: Metrics, data: Tables
    ) -> None:
        ood = ["ood/near/p", "ood/near/q", "ood/far/r"]

        def mean(method: str, score: str) -> float:
            parts = [data[HeadKey(method=method, seed=seed)] for seed in SEEDS]
            name = f"score_{score}"
            values = [auroc(column(p, "test", name), column(p, ood, name)) for p in parts]
            return float(np.mean(values))

        gains = {gain.step: gain.auroc.value for gain in metrics.gains}
        training = mean("ebm", "mcm") - mean("coop", "mcm")
        score = mean("ebm", "delta_energy") - mean("ebm", "mcm")
        assert gains["training"] == pytest.approx(training, abs=1e-12)
        assert gains["score"] == pytest.approx(score, abs=1e-12)
        assert gains["both"] == pytest.approx(training + score, abs=1e-12)
        assert f"{100 * training:+.1f}" in metrics.sentence
        assert f"{100 * score:+.1f}" in metrics.sentence

    def test_equal_heads_differ_by_nothing(self) -> None:
        part = table(0, SETS)
        same = part.set_column(
            part.column_names.index("score_delta_energy"), "score_delta_energy", part["score_mcm"]
        )
        found = run({HeadKey(method="coop", seed=0): same}).comparisons
        assert found
        assert all(c.difference == Interval(0, 0, 0) for c in found)

    def test_without_the_marked_rows_or_the_reference_there_is_no_comparison(
        self, data: Tables
    ) -> None:
        for found in (run(data, ("mcm",)), run(data, compare=CompareConfig())):
            assert (found.gains, found.sentence, found.comparisons) == ((), "", ())
            assert not any(row.label for row in found.rows if row.score == "delta_energy")

    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            ({"start": {"method": "a", "score": "mcm", "label": "x"}}, "both of start and end"),
            ({"start": {"method": "a", "score": "mcm"}}, "label"),
        ],
    )
    def test_the_section_is_checked(self, given: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValidationError, match=problem):
            CompareConfig.model_validate(given)


def test_what_else_the_result_names(metrics: Metrics) -> None:
    assert metrics.facts.benchmark == "toy"
    assert metrics.target_tpr == 0.95
    assert metrics.seeds == (0, 1)
    labels = {(r.method, r.score): r.label for r in metrics.rows}
    assert labels["coop", "mcm"] == "where it starts"
    assert labels["ebm", "delta_energy"] == "where it ends"
    assert labels["coop", "delta_energy"] == labels["ebm", "mcm"] == ""
    assert metrics.rows[0].params == {"tau": 0.5}
    assert [(r.method, r.score) for r in metrics.rows if r.is_criterion] == [
        ("coop", "mcm"),
        ("ebm", "delta_energy"),
    ]
    assert metrics.criterion_row("ebm").score == "delta_energy"


def test_the_record_is_read_back_as_it_was(metrics: Metrics) -> None:
    assert Metrics.from_json(metrics.to_json(), "metrics.json") == metrics
    with pytest.raises(UserError, match=r"metrics\.json: not a Metrics"):
        Metrics.from_json(b"{}", "metrics.json")


def test_one_seed_has_no_spread() -> None:
    found = run({HeadKey(method="coop", seed=0): table(0, SETS)}, target_tpr=0.9)
    row = found.rows[0]
    assert row.auroc["near"].std == 0
    known = column(table(0, SETS), "test", "score_mcm")
    other = column(table(0, SETS), "ood/far/r", "score_mcm")
    assert row.fpr["far"].mean == pytest.approx(fpr(known, other, 0.9), abs=1e-12)


class TestMissingGroups:
    def run(self, *names: str) -> Metrics:
        return run(tables({name: SETS[name] for name in names}))

    def test_no_shifted_set(self) -> None:
        row = self.run("validation", "test", "ood/far/r").rows[0]
        assert row.ood_accuracy is None
        assert row.shifted == {}
        assert set(row.auroc) == {"far", "mean"}
        assert row.full_spectrum is not None
        assert row.full_spectrum.auroc == row.auroc["far"]

    def test_no_ood_set(self) -> None:
        found = self.run("validation", "test", "shifted/a")
        row = found.rows[0]
        assert row.auroc == row.fpr == row.sets == {}
        assert row.full_spectrum is None
        assert row.id_accuracy.mean > 0
        assert (found.gains, found.comparisons) == ((), ())

    def test_no_validation_set(self) -> None:
        with pytest.raises(UserError, match=r"set 'validation'.*threshold"):
            self.run("test", "ood/far/r")
