"""A made-up run with names that try the escaping, its figures by scikit-learn and numpy."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipelines.evaluate.metrics import (
    Comparison,
    Detection,
    Facts,
    Gain,
    Interval,
    MetricRow,
    Metrics,
    Rejected,
    SetDetection,
    Spread,
    Threshold,
)
from pipelines.methods import METHODS as METHOD_PLUGINS
from pipelines.records import HeadKey
from pipelines.report import page as report
from pipelines.report.page import ReportInputs
from pipelines.sweep.result import SweepResult

CLASSES = ("zero", "one & only", "<b>two</b>")
SETS = {
    "validation": ("ID", 300, 0.0),
    "test": ("ID", 400, 0.0),
    "shifted/rotated (30 degrees)": ("shifted", 250, -0.7),
    "shifted/blurred": ("shifted", 250, -1.0),
    "ood/near/seven (known)": ("near", 120, -1.4),
    "ood/near/<eight>": ("near", 130, -1.8),
    "ood/far/flower $5 & $6": ("far", 200, -3.0),
}
SCORES = {"mcm": {"tau": 0.5}, "energy": {"tau": 1.0}, "delta_energy": {"tau": 0.1, "c": 2}}
METHODS = ("coop", "ebm")
LOWS = {"mcm": (0.004, -0.03, -0.01), "energy": (-0.024, 0.0062, -0.019)}
LABELS = {
    ("coop", "mcm"): "Zhu 2025: CoOp + MCM",
    ("ebm", "delta_energy"): "Zhu 2025: EBM + DeltaEnergy",
}


def scores_table(method: str, seed: int, names: list[str]) -> pa.Table:
    """Scores whose sets overlap as real ones do; no network, only shifted normal draws."""
    generator = np.random.default_rng([seed, METHODS.index(method)])
    columns: dict[str, list] = {name: [] for name in ("set", "key", "label", "predicted")}
    shift, confidence = [], []
    for name in names:
        role, count, offset = SETS[name]
        labels = np.full(count, -1) if role in ("near", "far") else np.arange(count) % 3
        guessed = np.where(generator.random(count) < 0.1, (labels + 1) % 3, labels % 3)
        columns["set"] += [name] * count
        columns["key"] += [f"{name}/{i:04d}.png" for i in range(count)]
        columns["label"] += labels.tolist()
        columns["predicted"] += guessed.tolist()
        shift.append(offset + generator.normal(size=count))
        confidence.append(generator.uniform(0.4, 1.0, size=count))
    base = np.concatenate(shift)
    data = {**columns, "confidence": np.concatenate(confidence)}
    for i, score in enumerate(SCORES):
        data[f"score_{score}"] = (1 + i) * base + generator.normal(
            scale=0.5 + 0.3 * i, size=len(base)
        )
    return pa.table(data)


def spread(values: list[float]) -> Spread:
    return Spread(mean=float(np.mean(values)), std=float(np.std(values)))


def measured(table: pa.Table, score: str) -> dict[str, float]:
    """The metrics of one table by scikit-learn and numpy, flat."""
    sets = np.array(table["set"].to_pylist())
    values = table[f"score_{score}"].to_numpy()
    right = table["predicted"].to_numpy() == table["label"].to_numpy()
    known = values[sets == "test"]
    threshold = np.quantile(values[sets == "validation"], 0.05)
    found = {"id_accuracy": right[sets == "test"].mean(), "threshold": threshold}
    for name in set(sets.tolist()):
        of_set = values[sets == name]
        found[f"tpr {name}"] = (of_set >= threshold).mean()
        if name.startswith("shifted/"):
            found[f"accuracy {name}"] = right[sets == name].mean()
        if name.startswith("ood/"):
            truth = np.r_[np.ones(len(known)), np.zeros(len(of_set))]
            found[f"auroc {name}"] = roc_auc_score(truth, np.r_[known, of_set])
            found[f"fpr {name}"] = (of_set >= np.quantile(known, 0.05)).mean()
    return found


def metrics_row(tables: list[pa.Table], method: str, score: str, names: list[str]) -> MetricRow:
    each = [measured(table, score) for table in tables]

    def over(*keys: str) -> Spread:
        return spread([float(np.mean([found[key] for key in keys])) for found in each])

    unknown = {n: SETS[n][0] for n in names if n.startswith("ood/")}
    grouped = {g: [n for n in unknown if unknown[n] == g] for g in dict.fromkeys(unknown.values())}
    if unknown:
        grouped["mean"] = list(unknown)
    shifted = [n for n in names if n.startswith("shifted/")]
    threshold = each[0]["threshold"]
    more = {"fpr_ood": spread([0.3]), "aupr_id": spread([0.9]), "aupr_ood": spread([0.8])}
    by_group = {
        metric: {g: over(*(f"{metric} {n}" for n in of)) for g, of in grouped.items()}
        for metric in ("auroc", "fpr")
    }
    return MetricRow(
        method=method,
        score=score,
        params=SCORES[score],
        is_criterion=(method, score) in LABELS,
        label=LABELS.get((method, score), ""),
        id_accuracy=over("id_accuracy"),
        ood_accuracy=over(*(f"accuracy {n}" for n in shifted)) if shifted else None,
        shifted={n: over(f"accuracy {n}") for n in shifted},
        sets={
            n: SetDetection(auroc=over(f"auroc {n}"), fpr=over(f"fpr {n}"), **more) for n in unknown
        },
        full_spectrum=Detection(auroc=spread([0.7]), fpr=spread([0.6])),
        ece=spread([0.05]),
        aurc=spread([0.02]),
        augrc=spread([0.015]),
        threshold=Threshold(
            value=threshold, low=threshold - 0.1, high=threshold + 0.1, num_images=300
        ),
        tpr={n: over(f"tpr {n}") for n in ["test", *shifted]},
        validation_fpr={n: over(f"tpr {n}") for n in unknown},
        **{name: {"mean": value} for name, value in more.items()},
        **by_group,
    )


def digit(set_name: str, key: str) -> bytes:
    """A small grey image of its own for each key, as PNG bytes."""
    value = sum(map(ord, set_name + key)) % 200
    pixels = np.full((8, 8), value, dtype=np.uint8)
    pixels[2:6, 3:5] = 255 - value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Example:
    """A run's metrics and what its report shows beside them."""

    metrics: Metrics
    inputs: ReportInputs

    def page(self, **changes: Any) -> str:
        """The report, with other metrics or inputs."""
        metrics = changes.pop("metrics", self.metrics)
        return report.write(metrics, replace(self.inputs, **changes))

    def but(self, **changes: Any) -> Metrics:
        """The metrics with other values."""
        return self.metrics.model_copy(update=changes)


def build(seeds: tuple[int, ...] = (0, 1), without: str = "nothing") -> Example:
    """A run; sets whose name starts with `without` are left out."""
    names = [name for name in SETS if not name.startswith(without)]
    scores = {
        HeadKey(method=m, seed=seed): scores_table(m, seed, names)
        for m in METHODS
        for seed in seeds
    }
    rows = [
        metrics_row(
            [scores[HeadKey(method=method, seed=seed)] for seed in seeds], method, score, names
        )
        for method in METHODS
        for score in SCORES
    ]
    facts = Facts(
        benchmark="digits",
        backbone="mini",
        class_names=CLASSES,
        notes="Two near sets & one far set; <stored> split.",
        sets={name: SETS[name][1] for name in sorted(names)},
        rejected=tuple(
            Rejected(
                source="folder",
                key=f"broken <{i}>.jpg",
                reason="truncated",
                message="image file is truncated",
            )
            for i in range(14)
        ),
    )
    gain = Interval(-0.012, -0.03, 0.01)
    metrics = Metrics(
        facts=facts,
        target_tpr=0.95,
        seeds=seeds,
        criterion="mean AUROC",
        rows=tuple(rows),
        comparisons=tuple(differences()),
        gains=tuple(Gain(step=s, auroc=gain, fpr=gain) for s in ("training", "score", "both")),
        sentence="Training gained 1.0 points & the score 2.0.",
    )
    inputs = ReportInputs(
        scores=scores,
        config_yaml="benchmark:\n  name: digits  # <not markup>\n",
        stamp={"git_sha": "0123abc", "dirty": "no", "torch": "2.15.0"},
        sweep=sweep_result(),
        image=digit,
    )
    return Example(metrics, inputs)


def differences() -> Iterator[Comparison]:
    """DeltaEnergy against every other score, with the intervals of `LOWS`."""
    for method in METHODS:
        for other, lows in LOWS.items():
            for metric in ("auroc", "fpr"):
                for group, low in zip(("near", "far", "mean"), lows, strict=True):
                    yield Comparison(
                        method=method,
                        group=group,
                        metric=metric,
                        first="delta_energy",
                        second=other,
                        difference=Interval(low + 0.01, low, low + 0.02),
                    )


def sweep_result() -> SweepResult:
    """Two trials of each method; the choice has the values of the second one's setting."""
    settings = {"coop": {"name": "coop"}, "ebm": {"name": "ebm", "weight": 0.5}}
    best = {s: {"params": p, "auroc": 0.9, "fpr": 0.4, "tried": 2} for s, p in SCORES.items()}
    return SweepResult.model_validate(
        {
            "criterion": "mean AUROC",
            "judged_on": "validation_ood",
            "budget": 2,
            "methods": {
                m: {
                    "setting": METHOD_PLUGINS[m].Config(**settings[m]),
                    "chosen": {"method.weight": 0.5},
                    "trial": 1,
                    "scores": SCORES,
                    "validation": best,
                    "accuracy": 0.93,
                }
                for m in METHODS
            },
            "trials": [
                {
                    "method": m,
                    "trial": i,
                    "settings": {"weight": 0.5 * i},
                    "status": "done",
                    "accuracy": 0.9 + 0.01 * i,
                    "scores": {"mcm": {**best["mcm"], "auroc": 0.8}},
                    "seconds": 1.25,
                }
                for m in METHODS
                for i in range(2)
            ],
        }
    )


def percent(value: Spread | None) -> str:
    assert value is not None
    return f"{100 * value.mean:.1f} ({100 * value.std:.1f})"


def numbers_of(row: MetricRow) -> list[str]:
    """The cells of the main table."""
    by_group = (row.auroc, row.fpr)
    cells = [figures[g] for figures in by_group for g in ("near", "far", "mean")]
    return [percent(cell) for cell in (row.id_accuracy, row.ood_accuracy, *cells)]
