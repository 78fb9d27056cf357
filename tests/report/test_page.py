"""The page shows the numbers of the metrics, whatever the data are called."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluate.metrics import (
    ChosenAgainstDefault,
    DefaultComparison,
    Interval,
)
from pipelines.fitted.result import EnergyModelHistory, HeadTraining
from pipelines.records import HeadKey
from pipelines.report import page as report
from pipelines.report.text import text_table
from pipelines.score.patches import PatchMap
from tests.report.example import (
    LABELS,
    LOWS,
    METHODS,
    SCORES,
    Example,
    build,
    numbers_of,
    percent,
)
from tests.sweep_record import record as sweep_record

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
def evidence() -> Example:
    return build()


@pytest.fixture(scope="module")
def html(evidence: Example) -> str:
    return evidence.page()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def body(page: Page, name: str) -> list[list[str]]:
    """The rows of a table below its two heading lines, without those that only name a method."""
    return [row for row in page.tables[name][2:] if len(row) > 1]


def test_the_main_table_shows_every_number_of_every_row(evidence, page):
    shown = body(page, "main")

    expected = []
    for row in evidence.metrics.rows:
        assert row.full_spectrum is not None
        both = percent(row.full_spectrum.auroc), percent(row.full_spectrum.fpr)
        expected.append([*numbers_of(row), *both])
    assert [row[1:] for row in shown] == expected
    assert [row[0].split()[0] for row in shown] == list(SCORES) * 2
    assert page.tables["main"][1][1:3] == ["ID ACC", "OOD ACC"]
    assert page.tables["main"][1][3:] == ["near", "far", "mean"] * 2 + ["AUROC", "FPR"]
    assert page.tables["main"][0] == ["", "", "AUROC", "FPR at 95 % TPR", "full spectrum"]


def test_chosen_parameters_and_the_labels_of_marked_rows(page):
    marked = {
        (attrs["data-method"], attrs["data-score"])
        for tag, attrs in page.attributes
        if tag == "tr" and attrs.get("class") == "marked"
    }
    labels = [row[0] for row in body(page, "main")]

    assert marked == set(LABELS)
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


def test_each_set_has_its_figures(evidence, page):
    rows = evidence.metrics.rows
    ood = ["ood/near/<eight>", "ood/near/seven (known)", "ood/far/flower $5 & $6"]
    shifted = ["shifted/blurred", "shifted/rotated (30 degrees)"]

    assert page.tables["by-set"][0][1:] == ["near: <eight>", "near: seven (known)",
                                            "far: flower $5 & $6"]  # fmt: skip
    assert [row[1:] for row in body(page, "by-set")] == [
        [percent(cell) for name in ood for cell in (row.sets[name].auroc, row.sets[name].fpr)]
        for row in rows
    ]
    assert [row[0] for row in body(page, "shifted")] == list(METHODS)
    assert [row[1:] for row in body(page, "shifted")] == [
        [percent(row.id_accuracy), *(percent(row.shifted[name]) for name in shifted)]
        for row in (rows[0], rows[3])
    ]
    interval = "{value:.4g} [{low:.4g}, {high:.4g}]"
    assert [row[1:] for row in body(page, "tpr")] == [
        [interval.format(**row.threshold.model_dump()).replace("-", MINUS)]
        + [percent(row.tpr[name]) for name in ("test", *shifted)]
        + [percent(row.validation_fpr[name]) for name in ood]
        for row in rows
    ]


def test_the_threshold_line_names_the_set_that_loses_most(evidence, page):
    rows = evidence.metrics.rows
    least = min(row.tpr["shifted/blurred"].mean for row in rows)

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
    assert evidence.page() == html


def test_mistakes_are_the_most_confident_ones(evidence, page):
    table = evidence.inputs.scores[HeadKey(method="ebm", seed=0)].to_pylist()
    threshold = evidence.metrics.rows[5].threshold.value

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

    shown = Page(evidence.page(image=image))
    images = [attrs["src"] for tag, attrs in shown.attributes if tag == "img"]

    assert 0 < len(images) < 48
    assert all(max(decoded(uri).size) == 112 and len(uri) < 20_000 for uri in images)
    assert [attrs.get("class") for _, attrs in shown.attributes].count("noimage") == 48 - len(
        images
    )


def test_maps_of_the_most_confident_mistakes_are_shared_among_the_methods(evidence, page):
    asked: list[tuple[str, list[tuple[str, str]]]] = []
    values = np.arange(4.0).reshape(2, 2)
    crop = np.zeros((64, 96, 3), np.uint8)

    def maps(row, images):
        if images:
            asked.append((row.method, list(images)))
        if row.method == "coop":
            return "head <x> compares no feature with text"
        drawn = [PatchMap(row.score, values, crop) for _ in images]
        return [*drawn[:-1], None] if drawn else []

    shown = Page(evidence.page(maps=maps))
    assert shown.unbalanced == []
    assert "coop: no map, head <x> compares no feature with text." in shown.paragraphs
    ((method, images),) = asked
    assert method == "ebm"
    assert len(images) == len(set(images)) == 12
    kinds = [image[0].rpartition("/")[0] or image[0] for image in images[:4]]
    assert kinds == ["test", "test", "ood/near", "ood/far"]
    pictures = [attrs for tag, attrs in shown.attributes if tag == "img"]
    mapped = [attrs for attrs in pictures if "jpeg" in attrs["src"][:15]]
    assert [attrs["alt"] for attrs in mapped] == [key for _, key in images[:-1]]
    assert all(decoded(attrs["src"]).size == (168, 112) for attrs in mapped)
    assert "#where" not in {attrs.get("href") for _, attrs in page.attributes}


def test_without_any_map_the_reasons_stand_alone(evidence):
    shown = Page(evidence.page(maps=lambda *_: "the run keeps no local features"))
    said = [text for text in shown.paragraphs if "no map" in text]
    assert said == [f"{method}: no map, the run keeps no local features." for method in METHODS]


def test_rejected_images_are_counted_and_the_first_shown(evidence, page):
    shown = page.tables["rejected-1"]
    keys = sorted(entry.key for entry in evidence.metrics.facts.rejected)

    assert [row[1] for row in shown[1:]] == keys[:10]
    assert "truncated: 14" in page.paragraphs
    assert "and 4 more, listed in metrics.json" in page.paragraphs
    text = " ".join(text_table(evidence.metrics).split())
    assert "Rejected images, left out of all figures: 14 truncated." in text


def test_settings_trials_and_stamp(evidence, page):
    assert page.tables["chosen"][1] == [
        "coop", "method.weight=0.5", "mcm (tau=0.5); energy (tau=1); delta_energy (tau=0.1, c=2)",
        "93.0",
    ]  # fmt: skip
    assert page.tables["trials"][2] == ["coop", "1", "weight=0.5", "91.0", "mcm 80.0", "1.2"]
    assert page.tables["stamp"] == [[k, v] for k, v in sorted(evidence.inputs.stamp.items())]


@pytest.mark.parametrize(
    ("arguments", "absent", "columns"),
    [
        ({"without": "shifted"}, "shifted", 9),
        ({"without": "ood/far"}, "none", 9),
        ({"without": "ood/"}, "by-set", 3),
    ],
)
def test_missing_parts_are_left_out(arguments, absent, columns):
    partial = build(**arguments)
    shown = Page(partial.page())
    text = text_table(partial.metrics)

    assert {len(row) for row in body(shown, "main")} == {columns}
    assert absent not in shown.tables
    assert shown.unbalanced == []
    assert ("-" in text.splitlines()[3].split()) == (arguments["without"] == "shifted")
    assert set(report.figures(partial.metrics, partial.inputs.scores)) >= {"table.png"}


def test_one_seed_has_no_deviation():
    single = build(seeds=(0,))
    shown = Page(single.page())

    assert all("(" not in cell for row in body(shown, "main") for cell in row[1:])
    assert "(0.0)" not in text_table(single.metrics)
    assert "one seed" in text_table(single.metrics)


def test_without_sweep_rejects_images_or_scores(evidence):
    facts = evidence.metrics.facts.model_copy(update={"rejected": ()})
    metrics = evidence.but(facts=facts, comparisons=(), gains=(), sentence="")
    shown = Page(evidence.page(metrics=metrics, scores={}, sweep=None, image=None))

    assert "Nothing was swept: every method ran as configured." in shown.paragraphs
    assert "None: every image could be read." in shown.paragraphs
    assert "No pairs of scores were compared." in shown.paragraphs
    assert {"img", "svg"}.isdisjoint(tag for tag, _ in shown.attributes)


def test_trainings_show_the_kept_epoch_and_the_last_figures(evidence, page):
    trainings = tuple(
        HeadTraining(
            key=HeadKey(method="ebm", seed=seed),
            best_epoch=seed + 2,
            epochs=30,
            figures={"loss": 0.5, "bound_gradient_ratio": 0.012345},
        )
        for seed in range(2)
    )
    shown = Page(evidence.page(metrics=evidence.but(trainings=trainings)))

    assert shown.tables["head-trainings"][1:] == [
        ["ebm", "0", "2 of 30", "bound_gradient_ratio 0.01235, loss 0.5"],
        ["ebm", "1", "3 of 30", "bound_gradient_ratio 0.01235, loss 0.5"],
    ]
    assert shown.unbalanced == []
    assert "head-trainings" not in page.tables


def test_energy_models_show_every_epoch(evidence, page):
    def epoch(number: int) -> dict[str, float]:
        names = ("energy/real", "energy/sampled", "network/real", "network/sampled", "loss")
        lengths = ("drift", "norm/real", "norm/sampled")
        values = {name: number + place / 8 for place, name in enumerate((*names, *lengths))}
        return {"epoch": float(number), **values, "coverage": 0.5 * number}

    history = (epoch(1), epoch(2))
    model = EnergyModelHistory(score="feature_ebm", seed=3, address="a", history=history)
    shown = Page(evidence.page(metrics=evidence.but(energy_models=(model,))))

    assert shown.tables["energy-model-1"][2] == [
        "2", "2", "2.125", "2.25", "2.375", "2.5", "2.625", "2.75", "2.875", "100 %",
    ]  # fmt: skip
    assert len(shown.tables["energy-model-1"]) == 3
    assert shown.unbalanced == []
    assert "energy-model-1" not in page.tables


def against_default(method: str, score: str, auroc: float) -> DefaultComparison:
    def entry(width: float) -> ChosenAgainstDefault:
        difference = Interval(auroc, auroc - width, auroc + width)
        return ChosenAgainstDefault(default=0.9, chosen=0.9 + auroc, difference=difference)

    return DefaultComparison(
        method=method,
        score=score,
        is_criterion=(method, score) in LABELS,
        seeds=(0,),
        default_setting={"weight": 1.0},
        chosen_setting={"weight": 2.0},
        default_params={"tau": 1.0},
        chosen_params={"tau": 0.25},
        auroc=entry(0.01),
        fpr=entry(0.02),
    )


def test_what_the_choice_gained_is_a_table_and_a_line_for_each_criterion(evidence):
    rows = [
        against_default("coop", "mcm", 0.005),
        against_default("coop", "energy", 0.03),
        against_default("ebm", "delta_energy", 0.025),
    ]
    metrics = evidence.but(best_against_default=tuple(rows))
    shown = Page(evidence.page(metrics=metrics))
    assert shown.unbalanced == []
    assert [row for row in body(shown, "best-against-default") if row[0] == "energy"] == [
        ["energy", "tau=1, weight=1", "tau=0.25, weight=2", "90.0", "93.0",
         "+3.0 [+2.0, +4.0] better", "90.0", "93.0", "+3.0 [+1.0, +5.0] worse"]
    ]  # fmt: skip
    text = " ".join(text_table(metrics).split())
    assert "Chosen against default settings (seed 0, OOD pooled" in text
    assert (
        "ebm + delta_energy: AUROC 92.5 against 90.0, +2.5 [+1.5, +3.5] better; "
        "FPR 92.5 against 90.0, +2.5 [+0.5, +4.5] worse"
    ) in text
    assert "coop + mcm: AUROC 90.5 against 90.0, +0.5 [-0.5, +1.5] no difference shown" in text
    assert "coop + energy:" not in text
    assert "Chosen against default" not in text_table(evidence.metrics)


@pytest.mark.slow
def test_the_sweeps_evidence_is_told_and_drawn(evidence):
    sweep, surfaces = sweep_record()
    shown = Page(evidence.page(sweep=sweep, surfaces=surfaces))
    assert shown.unbalanced == []
    said = " ".join(shown.paragraphs)
    assert "coop: 9 trials done, 18 s; ebm: 57 trials done, 1 stopped early, 2 failed" in said
    assert "ebm, 2 failed: the loss became NaN in epoch 2" in said
    assert "the best value of training.lr (0.1) is at the edge of its space (0.001 to 0.1)" in said
    assert "random forest" in said
    before = Page(evidence.page())
    drawn = [sum(tag == "svg" for tag, _ in page.attributes) for page in (shown, before)]
    # Before: two parallel coordinates of two trials each, and the front of all four. Beside the
    # nine, FPR over the temperature of each method's criterion (Liu 2020, figure 4a).
    assert drawn[0] - drawn[1] == 9 - 3 + 2
