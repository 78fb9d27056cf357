"""The report shows the numbers of the metrics, in every form, whatever the data are called."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipelines import plots
from pipelines.report import figures as report_figures
from pipelines.report import page as report
from tests.sweep_record import record as sweep_record

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
CELLS = {
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
    if unknown:
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
                "method": method,
                "group": group,
                "metric": metric,
                "a": "delta_energy",
                "b": other,
                "difference": low + 0.01,
                "low": low,
                "high": low + 0.02,
            }
            for method in METHODS
            for other, lows in LOWS.items()
            for metric in ("auroc", "fpr")
            for group, low in zip(("near", "far", "mean"), lows, strict=True)
        ],
        "gains": {
            step: {m: {"difference": -0.012, "low": -0.03, "high": 0.01} for m in ("auroc", "fpr")}
            for step in ("training", "score", "both")
        },
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


MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """What a reader sees: tables by id (rows of cell texts), paragraphs, texts by id, tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.paragraphs: list[str] = []
        self.unbalanced: list[str] = []
        self._open: list[tuple[str, str]] = []
        self._table = ""
        self._text: list[str] = []
        self.feed(text)
        self.close()
        self.unbalanced += [tag for tag, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.attributes.append((tag, found))
        if tag not in VOID:
            self._open.append((tag, found.get("id") or ""))
        if tag == "table":
            self._table = found.get("id") or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        if tag in ("td", "th", "p", "pre"):
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, name = self._open.pop()
        if opened != tag:
            self.unbalanced.append(tag)
        text = "".join(self._text)
        if tag in ("td", "th"):
            self.tables[self._table][-1].append(" ".join(text.split()))
        elif tag in ("p", "pre"):
            self.texts[name] = text
            self.paragraphs.append(" ".join(text.split()))

    def handle_data(self, data: str) -> None:
        self._text.append(data)


@pytest.fixture(scope="module")
def evidence() -> dict[str, Any]:
    return build()


@pytest.fixture(scope="module")
def html(evidence: dict[str, Any]) -> str:
    return report.write(**evidence)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def percent(stat: dict[str, float]) -> str:
    return f"{100 * stat['mean']:.1f} ({100 * stat['std']:.1f})"


def numbers_of(row: dict[str, Any]) -> list[str]:
    cells = [row["id_accuracy"], row["ood_accuracy"]]
    cells += [row[metric][g] for metric in ("auroc", "fpr") for g in ("near", "far", "mean")]
    return [percent(cell) for cell in cells]


def body(page: Page, name: str) -> list[list[str]]:
    """The rows of a table below its two heading lines, without those that only name a method."""
    return [row for row in page.tables[name][2:] if len(row) > 1]


def test_the_main_table_shows_every_number_of_every_row(evidence, page):
    shown = body(page, "main")

    assert [row[1:] for row in shown] == [numbers_of(row) for row in evidence["metrics"]["rows"]]
    assert [row[0].split()[0] for row in shown] == list(SCORES) * 2
    assert page.tables["main"][1][1:3] == ["ID ACC", "OOD ACC"]
    assert page.tables["main"][1][3:] == ["near", "far", "mean"] * 2
    assert page.tables["main"][0] == ["", "", "AUROC", "FPR at 95 % TPR"]


def test_chosen_parameters_and_the_seeds_cells_are_marked(page):
    marked = {
        (attrs["data-method"], attrs["data-score"])
        for tag, attrs in page.attributes
        if tag == "tr" and attrs.get("class") == "marked"
    }
    labels = [row[0] for row in body(page, "main")]

    assert marked == set(CELLS)
    assert labels[0] == "mcm tau=0.5 Zhu 2025: CoOp + MCM"
    assert labels[2] == "delta_energy tau=0.1, c=2"


def test_paired_intervals_carry_their_word(page):
    words = {"better": 0, "worse": 0, "no difference shown": 0}
    for row in body(page, "differences"):
        other = row[0].removeprefix("delta_energy against ")
        for place, cell in enumerate(row[1:]):
            low = LOWS[other][place % 3]
            sign = 1 if place < 3 else -1  # AUROC first; a lower FPR is better
            word = "no difference shown"
            if low * (low + 0.02) > 0:
                word = "better" if sign * low > 0 else "worse"
            words[word] += 1
            numbers = [f"{100 * value:+.1f}" for value in (low + 0.01, low, low + 0.02)]
            expected = "{} [{}, {}] ".format(*numbers).replace("-", MINUS) + word
            assert cell == expected

    assert page.tables["differences"][1][1:] == ["near", "far", "mean"] * 2
    assert all(count >= 4 for count in words.values())


def test_each_set_stands_apart(evidence, page):
    rows = evidence["metrics"]["rows"]
    ood = ["ood/near/<eight>", "ood/near/seven (known)", "ood/far/flower $5 & $6"]
    shifted = ["shifted/blurred", "shifted/rotated (30 degrees)"]

    assert page.tables["by-set"][0][1:] == ["near: <eight>", "near: seven (known)",
                                            "far: flower $5 & $6"]  # fmt: skip
    assert [row[1:] for row in body(page, "by-set")] == [
        [percent(row["sets"][name][metric]) for name in ood for metric in ("auroc", "fpr")]
        for row in rows
    ]
    assert [row[0] for row in body(page, "shifted")] == list(METHODS)
    assert [row[1:] for row in body(page, "shifted")] == [
        [percent(row["id_accuracy"]), *(percent(row["shifted"][name]) for name in shifted)]
        for row in (rows[0], rows[3])
    ]
    assert [row[1:] for row in body(page, "tpr")] == [
        ["{value:.4g} [{low:.4g}, {high:.4g}]".format(**row["threshold"]).replace("-", MINUS)]
        + [percent(row["tpr"][name]) for name in ("test", *shifted)]
        + [percent(row["validation_fpr"][name]) for name in ood]
        for row in rows
    ]


def test_the_threshold_line_names_the_set_that_loses_most(evidence, page):
    rows = evidence["metrics"]["rows"]
    least = min(row["tpr"]["shifted/blurred"]["mean"] for row in rows)

    assert f"of blurred, {100 * least:.1f} %" not in page.texts["threshold-note"]
    assert "accepts 95 % of the ID validation" in page.texts["threshold-note"]
    assert f"accepts {100 * least:.1f} %, the least here" in page.texts["threshold-note"]


def test_the_page_loads_nothing_and_is_well_formed(html, page):
    for _, attrs in page.attributes:
        for name in ("src", "href", "data", "srcset", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/"))
    assert "@import" not in html
    assert "url(http" not in html
    assert page.unbalanced == []
    assert len(html) < 1_000_000


def test_text_from_data_stays_text(html, page):
    tags = {tag for tag, _ in page.attributes}

    assert tags.isdisjoint({"eight", "stored", "not", "5"})
    assert "<b>two</b>" not in html
    assert html.count("&lt;b&gt;two&lt;/b&gt;") > 0
    assert page.texts["config"] == "benchmark:\n  name: digits  # <not markup>\n"
    assert page.texts["sentence"] == "Training gained 1.0 points & the score 2.0."
    assert "near: &lt;eight&gt;" in html[html.index("<svg") :]


def test_two_writes_give_the_same_bytes(evidence, html):
    assert report.write(**evidence) == html


def test_mistakes_are_the_most_confident_ones(evidence, page):
    table = evidence["scores"]["ebm", 0].to_pylist()
    threshold = evidence["metrics"]["rows"][5]["threshold"]["value"]

    def rejected(row: dict[str, Any]) -> bool:
        return row["set"] == "test" and row["score_delta_energy"] < threshold

    def misclassified(row: dict[str, Any]) -> bool:
        return row["set"] == "test" and row["label"] != row["predicted"]

    def accepted(group: str) -> Callable[[dict[str, Any]], bool]:
        return lambda row: (
            row["set"].startswith(f"ood/{group}/") and row["score_delta_energy"] >= threshold
        )

    kinds = {
        "ID taken for OOD": (rejected, "score_delta_energy", 1),
        "ID with the wrong class": (misclassified, "confidence", -1),
        "near OOD accepted": (accepted("near"), "score_delta_energy", -1),
        "far OOD accepted": (accepted("far"), "score_delta_energy", -1),
    }
    keys, titles = [], []
    for title, (wrong, column, sign) in kinds.items():
        found = sorted(filter(wrong, table), key=lambda row: sign * row[column])
        keys += [row["key"] for row in found[:6]]
        titles.append(f"{title}: {len(found)} images")

    images = [attrs for tag, attrs in page.attributes if tag == "img"]
    assert [attrs["alt"] for attrs in images[-len(keys) :]] == keys
    assert [text for text in page.paragraphs if text.endswith(" images")][-4:] == titles
    assert all(decoded(attrs["src"]).size == (8, 8) for attrs in images)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_large_and_unreadable_images(evidence):
    noise = np.random.default_rng(0).integers(0, 255, (600, 400, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")

    def image(set_name: str, _key: str) -> bytes | None:
        return {"test": buffer.getvalue(), "ood/near/<eight>": b"no image"}.get(set_name)

    shown = Page(report.write(**{**evidence, "image": image}))
    images = [attrs["src"] for tag, attrs in shown.attributes if tag == "img"]

    assert 0 < len(images) < 48
    assert all(max(decoded(uri).size) == 112 and len(uri) < 20_000 for uri in images)
    assert [attrs.get("class") for _, attrs in shown.attributes].count("noimage") == 48 - len(
        images
    )


def test_rejected_images_are_counted_and_the_first_shown(evidence, page):
    shown = page.tables["rejected-1"]
    keys = sorted(entry["key"] for entry in evidence["metrics"]["rejected"])

    assert [row[1] for row in shown[1:]] == keys[:10]
    assert "truncated: 14" in page.paragraphs
    assert "and 4 more, listed in metrics.json" in page.paragraphs
    text = " ".join(report.text_table(evidence["metrics"]).split())
    assert "Rejected images, left out of all figures: 14 truncated." in text


def test_settings_trials_and_stamp(evidence, page):
    assert page.tables["chosen"][1] == [
        "coop", "method.weight=0.5", "mcm (tau=0.5); energy (tau=1); delta_energy (tau=0.1, c=2)",
        "93.0",
    ]  # fmt: skip
    assert page.tables["trials"][2] == ["coop", "1", "weight=0.5", "91.0", "mcm 80.0", "1.2"]
    assert page.tables["stamp"] == [[k, v] for k, v in sorted(evidence["stamp"].items())]


@pytest.mark.parametrize(
    ("arguments", "absent", "columns"),
    [
        ({"without": "shifted"}, "shifted", 9),
        ({"without": "ood/far"}, "none", 7),
        ({"without": "ood/"}, "by-set", 3),
    ],
)
def test_missing_parts_are_left_out(arguments, absent, columns):
    partial = build(**arguments)
    shown = Page(report.write(**partial))
    text = report.text_table(partial["metrics"])

    assert {len(row) for row in body(shown, "main")} == {columns}
    assert absent not in shown.tables
    assert shown.unbalanced == []
    assert ("-" in text.splitlines()[3].split()) == (arguments["without"] == "shifted")
    assert set(report.figures(partial["metrics"], partial["scores"], sweep={})) >= {"table.png"}


def test_one_seed_has_no_deviation():
    single = build(seeds=(0,))
    shown = Page(report.write(**single))

    assert all("(" not in cell for row in body(shown, "main") for cell in row[1:])
    assert "(0.0)" not in report.text_table(single["metrics"])
    assert "one seed" in report.text_table(single["metrics"])


def test_without_sweep_rejects_images_or_scores(evidence):
    metrics = {**evidence["metrics"], "rejected": [], "paired": [], "gains": {}, "sentence": ""}
    bare = {**evidence, "metrics": metrics, "scores": {}, "sweep": {}, "image": None}
    shown = Page(report.write(**bare))

    assert "Nothing was swept: every method ran as configured." in shown.paragraphs
    assert "None: every image could be read." in shown.paragraphs
    assert "No pairs of scores were compared." in shown.paragraphs
    assert {"img", "svg"}.isdisjoint(tag for tag, _ in shown.attributes)


def test_the_text_table_has_the_numbers_in_columns_that_end_together(evidence):
    text = report.text_table(evidence["metrics"])
    lines = text.split("\n\n")[0].splitlines()
    rows = [line for line in lines if "(" in line]

    for line, row in zip(rows, evidence["metrics"]["rows"], strict=True):
        assert re.split(r"\s{2,}", line)[-8:] == numbers_of(row)
        assert line.startswith("* ") == ((row["method"], row["score"]) in CELLS)
    ends = [[match.end() for match in re.finditer(r"\S+ \([\d.]+\)", line)] for line in rows]
    assert all(each == ends[0] for each in ends)
    assert [lines[0].index(head) + len(head) for head in ("AUROC", "FPR at 95 % TPR")] == [
        ends[0][4], ends[0][7]
    ]  # fmt: skip
    assert max(map(len, text.splitlines())) <= 110
    assert "* ebm + delta_energy: Zhu 2025: EBM + DeltaEnergy" in text
    assert "delta_energy tau=0.1, c=2" in text
    assert "Training gained 1.0 points & the score 2.0." in text


def test_the_text_says_who_beats_whom_and_what_happens_to_shifted_images(evidence):
    metrics = evidence["metrics"]
    text = " ".join(report.text_table(metrics).split())

    for entry in metrics["paired"]:
        if (entry["metric"], entry["group"]) == ("auroc", "mean"):
            low, high = 100 * entry["low"], 100 * entry["high"]
            word = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            points = f"{100 * entry['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            assert f"{entry['b']} {points} {word}" in text
    for row in metrics["rows"]:
        shifted = [s["mean"] for name, s in row["tpr"].items() if name != "test"]
        if row["cell"]:
            said = text.split(f"Accepted as ID by {row['method']} + {row['score']} (%): ")[1]
            assert all(f" {100 * share:.1f}" in said for share in shifted)


@pytest.mark.parametrize(
    ("groups", "note"),
    [
        (3, "Standard deviations left out for width."),
        (9, "Groups left out for width: g0, g1, g2, g3, g4, g5, g6, g7, g8."),
    ],
)
def test_a_wide_text_table_says_what_it_leaves_out(evidence, groups, note):
    rows = []
    for row in evidence["metrics"]["rows"]:
        more = {f"g{i}": {"mean": 0.1 * i, "std": 0.0} for i in range(groups)}
        rows.append({**row, **{m: {**more, "mean": row[m]["mean"]} for m in ("auroc", "fpr")}})
    text = report.text_table({**evidence["metrics"], "rows": rows})

    assert max(map(len, text.splitlines())) <= 110
    assert note in " ".join(text.split())
    assert f"{100 * rows[0]['fpr']['mean']['mean']:.1f}" in text


def test_the_markdown_table_has_the_same_numbers(evidence):
    text = report.markdown_table(evidence["metrics"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip(" *") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]

    assert {len(row) for row in cells} == {11}
    assert [row[3:] for row in cells[2:]] == [numbers_of(r) for r in evidence["metrics"]["rows"]]
    assert "\\<stored\\> split" in text
    assert [("**" in line) for line in lines[2:]] == [
        (m, s) in CELLS for m in METHODS for s in SCORES
    ]


def drawn_texts(figure: Any) -> list[str]:
    root = ElementTree.fromstring(plots.svg(figure, "title"))
    return ["".join(text.itertext()) for text in root.iter() if text.tag.endswith("text")]


def judged(evidence: dict[str, Any], method: str, score: str) -> report_figures.Judged:
    (row,) = (
        r for r in evidence["metrics"]["rows"] if (r["method"], r["score"]) == (method, score)
    )
    table = evidence["scores"][method, 0]
    return report_figures.Judged(method, score, row["threshold"]["value"], table)


def test_roc_panels_state_the_area_of_all_pairs(evidence):
    item = judged(evidence, "coop", "mcm")
    rows = evidence["scores"]["coop", 0].to_pylist()
    texts = drawn_texts(report_figures.roc(item, "near", 0.95))

    for score in SCORES:
        known = np.array([r[f"score_{score}"] for r in rows if r["set"] == "test"])
        unknown = np.array([r[f"score_{score}"] for r in rows if r["set"].startswith("ood/near/")])
        assert f"{score}  {100 * (known[:, None] > unknown).mean():.1f}" in texts


def test_histograms_state_the_share_accepted_of_each_kind(evidence):
    item = judged(evidence, "ebm", "delta_energy")
    rows = evidence["scores"]["ebm", 0].to_pylist()
    texts = drawn_texts(report_figures.histogram(item))

    for name, prefix in {"ID": "test", "shifted": "shifted/", "near": "ood/near/"}.items():
        scores = [r["score_delta_energy"] for r in rows if r["set"].startswith(prefix)]
        assert name in texts
        assert f"{100 * np.mean(np.array(scores) >= item.threshold):.1f} %" in texts


def test_figures_are_png_equal_each_time_and_leave_matplotlib_as_it_was(evidence):
    before = dict(matplotlib.rcParams)
    arguments = evidence["metrics"], evidence["scores"]
    first = report.figures(*arguments, sweep=evidence["sweep"])

    assert first == report.figures(*arguments, sweep=evidence["sweep"])
    assert set(first) == {"table.png", "histograms.png", "accuracy_detection.png"}
    assert all(Image.open(io.BytesIO(content)).format == "PNG" for content in first.values())
    assert dict(matplotlib.rcParams) == before


def test_energy_models_show_every_epoch(evidence, page):
    def epoch(number: int) -> dict[str, float]:
        names = ("energy/real", "energy/sampled", "network/real", "network/sampled", "loss")
        lengths = ("drift", "norm/real", "norm/sampled")
        values = {name: number + place / 8 for place, name in enumerate((*names, *lengths))}
        return {"epoch": float(number), **values, "coverage": 0.5 * number}

    models = [{"score": "feature_ebm", "seed": 3, "history": [epoch(1), epoch(2)]}]
    shown = Page(
        report.write(**{**evidence, "metrics": evidence["metrics"] | {"energy_models": models}})
    )

    assert shown.tables["energy-model-1"][2] == [
        "2", "2", "2.125", "2.25", "2.375", "2.5", "2.625", "2.75", "2.875", "100 %",
    ]  # fmt: skip
    assert len(shown.tables["energy-model-1"]) == 3
    assert shown.unbalanced == []
    assert "energy-model-1" not in page.tables


def against_default(method: str, score: str, auroc: float) -> dict[str, Any]:
    entry = {"default": 0.9, "chosen": 0.9 + auroc, "difference": auroc}
    return {
        "method": method,
        "score": score,
        "own": score == {"coop": "mcm", "ebm": "delta_energy"}[method],
        "seeds": [0],
        "default_setting": {"weight": 1.0},
        "chosen_setting": {"weight": 2.0},
        "default_params": {"tau": 1.0},
        "chosen_params": {"tau": 0.25},
        "auroc": {**entry, "low": auroc - 0.01, "high": auroc + 0.01},
        "fpr": {**entry, "low": auroc - 0.02, "high": auroc + 0.02},
    }


def test_what_the_choice_gained_is_a_table_and_a_line_for_each_own_score(evidence):
    rows = [
        against_default("coop", "mcm", 0.005),
        against_default("coop", "energy", 0.03),
        against_default("ebm", "delta_energy", 0.025),
    ]
    metrics = {**evidence["metrics"], "best_against_default": rows}
    shown = Page(report.write(**{**evidence, "metrics": metrics}))
    assert shown.unbalanced == []
    assert [row for row in body(shown, "best-against-default") if row[0] == "energy"] == [
        ["energy", "tau=1, weight=1", "tau=0.25, weight=2", "90.0", "93.0",
         "+3.0 [+2.0, +4.0] better", "90.0", "93.0", "+3.0 [+1.0, +5.0] worse"]
    ]  # fmt: skip
    text = " ".join(report.text_table(metrics).split())
    assert "Chosen against default settings (seed 0, OOD pooled" in text
    assert (
        "ebm + delta_energy: AUROC 92.5 against 90.0, +2.5 [+1.5, +3.5] better; "
        "FPR 92.5 against 90.0, +2.5 [+0.5, +4.5] worse"
    ) in text
    assert "coop + mcm: AUROC 90.5 against 90.0, +0.5 [-0.5, +1.5] no difference shown" in text
    assert "coop + energy:" not in text
    assert "Chosen against default" not in report.text_table(evidence["metrics"])


def test_the_sweeps_evidence_is_told_and_drawn(evidence):
    sweep, surfaces = sweep_record()
    shown = Page(report.write(**{**evidence, "sweep": sweep, "surfaces": surfaces}))
    assert shown.unbalanced == []
    said = " ".join(shown.paragraphs)
    assert "coop: 9 trials done, 18 s; ebm: 57 trials done, 1 stopped early, 2 failed" in said
    assert "ebm, 2 failed: the loss became NaN in epoch 2" in said
    assert "the best value of training.lr (0.1) is at the edge of its space (0.001 to 0.1)" in said
    assert "random forest" in said
    before = Page(report.write(**evidence))
    drawn = [sum(tag == "svg" for tag, _ in page.attributes) for page in (shown, before)]
    assert drawn[0] - drawn[1] == 9 - 2  # two parallel coordinates of two trials each before
