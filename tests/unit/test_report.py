"""The report shows the numbers of the metrics, in every form, whatever the data are called."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipelines import report

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
CELLS = {
    ("coop", "mcm"): "seed 000: CoOp + MCM",
    ("ebm", "delta_energy"): "seed 000: EBM + DeltaEnergy",
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


def stat(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}


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


def metrics_row(tables: list[pa.Table], method: str, score: str, names: list[str]) -> dict:
    each = [measured(table, score) for table in tables]

    def over(*keys: str) -> dict[str, float]:
        return stat([float(np.mean([found[key] for key in keys])) for found in each])

    unknown = {n: SETS[n][0] for n in names if n.startswith("ood/")}
    grouped = {g: [n for n in unknown if unknown[n] == g] for g in dict.fromkeys(unknown.values())}
    grouped["mean"] = list(unknown)
    shifted = [n for n in names if n.startswith("shifted/")]
    row = {
        "method": method,
        "score": score,
        "params": SCORES[score],
        "cell": CELLS.get((method, score), ""),
        "id_accuracy": over("id_accuracy"),
        "ood_accuracy": over(*(f"accuracy {n}" for n in shifted)) if shifted else None,
        "shifted": {n: over(f"accuracy {n}") for n in shifted},
        "sets": {n: {m: over(f"{m} {n}") for m in ("auroc", "fpr")} for n in unknown},
        "aupr_id": {"mean": stat([0.9])},
        "aupr_ood": {"mean": stat([0.8])},
        "full_spectrum": {"auroc": stat([0.7]), "fpr": stat([0.6])},
        "ece": stat([0.05]),
        "threshold": {
            "value": each[0]["threshold"],
            "low": each[0]["threshold"] - 0.1,
            "high": each[0]["threshold"] + 0.1,
            "num": 300,
        },
        "tpr": {n: over(f"tpr {n}") for n in ["test", *shifted]},
        "validation_fpr": {n: over(f"tpr {n}") for n in unknown},
    }
    for metric in ("auroc", "fpr"):
        row[metric] = {g: over(*(f"{metric} {n}" for n in of)) for g, of in grouped.items()}
    return row


def digit(set_name: str, key: str) -> bytes:
    """A small grey image of its own for each key, as PNG bytes."""
    value = sum(map(ord, set_name + key)) % 200
    pixels = np.full((8, 8), value, dtype=np.uint8)
    pixels[2:6, 3:5] = 255 - value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def build(seeds: tuple[int, ...] = (0, 1), without: str = "nothing") -> dict[str, Any]:
    """The arguments of `write` for a run; sets whose name starts with `without` are left out."""
    names = [name for name in SETS if not name.startswith(without)]
    scores = {(m, seed): scores_table(m, seed, names) for m in METHODS for seed in seeds}
    rows = [
        metrics_row([scores[method, seed] for seed in seeds], method, score, names)
        for method in METHODS
        for score in SCORES
    ]
    metrics = {
        "benchmark": "digits",
        "backbone": "mini",
        "class_names": list(CLASSES),
        "notes": "Two near sets & one far set; <stored> split.",
        "target_tpr": 0.95,
        "seeds": list(seeds),
        "sets": {name: SETS[name][1] for name in sorted(names)},
        "rejected": [
            {
                "source": "folder",
                "key": f"broken <{i}>.jpg",
                "reason": "truncated",
                "message": "image file is truncated",
            }
            for i in range(14)
        ],
        "rows": rows,
        "paired": [
            {
                "method": "ebm",
                "group": "mean",
                "metric": metric,
                "a": "delta_energy",
                "b": "mcm",
                "difference": low + 0.01,
                "low": low,
                "high": low + 0.02,
            }
            for metric, low in (
                ("auroc", 0.004),
                ("auroc", -0.03),
                ("auroc", -0.01),
                ("fpr", 0.004),
            )
        ],
        "gains": {"training": [], "score": []},
        "sentence": "Training gained 1.0 points & the score 2.0.",
    }
    setting = {"coop": {"score": "mcm"}, "ebm": {"score": "delta_energy", "weight": 0.5}}
    sweep = {
        "criterion": "mean AUROC",
        "budget": 2,
        "methods": {
            m: {
                "setting": setting[m],
                "chosen": {"method.weight": 0.5},
                "scores": SCORES,
                "validation": {s: {"auroc": 0.9, "fpr": 0.4} for s in SCORES},
                "accuracy": 0.93,
            }
            for m in METHODS
        },
        "trials": [
            {
                "method": m,
                "trial": i,
                "settings": {"weight": 0.5 * i},
                "accuracy": 0.9 + 0.01 * i,
                "auroc": {"mcm": 0.8},
                "seconds": 1.25,
            }
            for m in METHODS
            for i in range(2)
        ],
    }
    config = "benchmark:\n  name: digits  # <not markup>\n"
    stamp = {"git_sha": "0123abc", "dirty": "no", "torch": "2.15.0"}
    return {
        "metrics": metrics,
        "scores": scores,
        "sweep": sweep,
        "config_yaml": config,
        "stamp": stamp,
        "image": digit,
    }


class Page(HTMLParser):
    """Tables of a page by id (a list of rows of cell texts), texts by id, and what it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.table = ""
        self.cell: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.attributes.append((tag, found))
        if tag == "table":
            self.table = found.get("id") or ""
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.cell = []
        if found.get("id") and tag in ("p", "pre"):
            self.open.append(str(found["id"]))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self.cell is not None:
            self.tables[self.table][-1].append(" ".join("".join(self.cell).split()))
            self.cell = None
        elif tag in ("p", "pre") and self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)
        for name in self.open:
            self.texts[name] = self.texts.get(name, "") + data


@pytest.fixture(scope="module")
def evidence() -> dict[str, Any]:
    return build()


@pytest.fixture(scope="module")
def html(evidence: dict[str, Any]) -> str:
    return report.write(**evidence)


def percent(stat: dict[str, float]) -> str:
    return f"{100 * stat['mean']:.1f} ({100 * stat['std']:.1f})"


def numbers_of(row: dict[str, Any]) -> list[str]:
    cells = [row["id_accuracy"], row["ood_accuracy"]]
    cells += [row[metric][g] for metric in ("auroc", "fpr") for g in ("near", "far", "mean")]
    return [percent(cell) for cell in cells]


def test_the_main_table_shows_every_number_of_every_row(evidence, html):
    shown = [row for row in Page(html).tables["main"][2:] if len(row) > 1]

    assert [row[1:] for row in shown] == [numbers_of(row) for row in evidence["metrics"]["rows"]]
    assert [row[0].split()[0] for row in shown] == list(SCORES) * 2


def test_two_writes_give_the_same_bytes(evidence, html):
    assert report.write(**evidence) == html


def test_the_text_table_has_the_numbers_in_columns_that_end_together(evidence):
    lines = report.text_table(evidence["metrics"]).split("\n\n")[0].splitlines()

    assert len({len(line) for line in lines if "(" in line}) == 1
    assert max(map(len, lines)) <= 110
    for row in evidence["metrics"]["rows"]:
        assert any(all(number in line for number in numbers_of(row)) for line in lines)
