"""Scores that adapt to the stream of test images, on PACS: streams of docs/local.md.

From the run of `conf/streams.yaml`: its features, its mined words and the whole list of words. A
stream is drawn from the ID and OOD test images in a given ratio and order; `neg_label` (static),
`ada_neg` and `tanl` score it batch by batch, each from a fresh state. Their thresholds are set on
the ID validation images as a stream of their own, from a fresh state too. Every setting is that of
the public code; none was chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import ConfigError, load
from pipelines.finetune.cache import load_predictor
from pipelines.fitted.negative_words import corpus_features, read_words
from pipelines.ood import neg_label, ood_metrics, threshold_at_tpr
from pipelines.ood.checks import Array
from pipelines.ood.streams import TANL, AdaNeg, AdaNegSettings, StreamScore
from pipelines.plots import markdown_table, write_csv
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.score.by_name import negative_words
from pipelines.score.cache import load_records
from pipelines.settings.config import PipelineConfig

WORDS = ("preset=streams",)
# ID : OOD; a stream takes as many images as both sides have in that ratio.
RATIOS = {"ID only": (1, 0), "1:1": (1, 1), "10:1": (10, 1), "1:10": (1, 10)}
NUM_ORDERS = 3
# A score and the images a batch; `neg_label` has no state, so that its batches are alike.
STATIC = ("neg_label", 256)
PLACES = (STATIC, ("ada_neg", 32), ("ada_neg", 256), ("tanl", 32), ("tanl", 256))
# By name one figure an order, in percent.
Figures: TypeAlias = dict[str, list[float]]
# By score, batch size and ratio.
Found: TypeAlias = Mapping[tuple[str, int, str], Figures]


@dataclass(frozen=True)
class Data:
    """Unit features: images of three sets, the classes, the mined words and all words."""

    validation: Tensor
    known: Tensor
    unknown: Tensor
    classes: Tensor
    mined: Tensor
    corpus: Tensor


class Static:
    """`neg_label` as a stream score: it has no state. Its settings are those of `AdaNeg`."""

    def __init__(self, classes: Tensor, negatives: Tensor) -> None:
        """With unit text features of classes (K, D) and negative words (M, D)."""
        self._classes, self._negatives = classes, negatives

    def step(self, features: Array) -> Tensor:
        """Scores (B,) of images (B, D)."""
        images, settings = torch.as_tensor(features), AdaNegSettings()
        known, negative = images @ self._classes.T, images @ self._negatives.T
        return neg_label(known, negative, settings.tau, settings.groups)


SCORES: Mapping[str, Callable[[Data], StreamScore]] = {
    "neg_label": lambda data: Static(data.classes, data.mined),
    "ada_neg": lambda data: AdaNeg(data.classes, data.mined),
    "tanl": lambda data: TANL(data.classes, data.corpus),
}


def run(folder: Path) -> str:
    """Write streams.csv; return the tables as Markdown.

    Raises:
        ConfigError: where the run is missing, with its command.
    """
    opened = Run.open(load(PipelineConfig, "pipeline", WORDS), Quiet())
    if not opened.has("finetune"):
        command = " ".join(["python -m jobs.pipeline", *WORDS])
        raise ConfigError(["not in ./outputs yet; run first:", command])
    data = read(opened)
    found = measure(data, opened.config.target_tpr)
    names = ["auroc", "fpr", "rejected", "accepted"]
    lines = [
        (*place, order, *(figures[name][order] for name in names))
        for place, figures in found.items()
        for order in range(NUM_ORDERS)
    ]
    write_csv(
        folder / "streams.csv",
        ["score", "batch", "ID:OOD", "order", "AUROC", "FPR", "ID rejected", "OOD accepted"],
        lines,
    )
    return "\n\n".join([*tables(found), confident(data)])


def read(opened: Run) -> Data:
    """What the run left: all OOD sets together, and the words of its only head."""
    head = opened.finetuned.head("zero_shot")
    config, benchmark = opened.config, opened.benchmark
    words = read_words(config.negative_classes, config.negative_pool, benchmark.class_names)
    names = benchmark.class_names, benchmark.templates
    corpus = corpus_features(words, *names, opened.backbone, opened.storage)
    mined = negative_words(load_records(opened.storage, head.fitted))
    classes = load_predictor(opened.storage, head.address).arrays["text_features"]
    unknown = [opened.sets.load(name).features for name in opened.sets.names("ood")]
    return Data(
        validation=torch.from_numpy(opened.sets.load("validation").features),
        known=torch.from_numpy(opened.sets.load("test").features),
        unknown=torch.from_numpy(np.concatenate(unknown)),
        classes=torch.from_numpy(classes),
        mined=torch.from_numpy(mined).float(),
        corpus=corpus,
    )


def stream(
    num_known: int, num_unknown: int, ratio: tuple[int, int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A stream's images, drawn and put in order by the seed.

    Returns:
        places (N,) in [known images, unknown images], and which of them are known.
    """
    counts = zip((num_known, num_unknown), ratio, strict=True)
    times = min(count // share for count, share in counts if share)
    rng = np.random.default_rng(seed)
    known = rng.permutation(num_known)[: times * ratio[0]]
    unknown = rng.permutation(num_unknown)[: times * ratio[1]]
    places = rng.permutation(np.concatenate([known, num_known + unknown]))
    return places, places < num_known


def scores_of(score: StreamScore, images: Tensor, batch_size: int) -> NDArray[np.float64]:
    """The scores (N,) of a stream (N, D), batch by batch."""
    parts: list[Tensor] = [score.step(part) for part in torch.split(images, batch_size)]
    scores: NDArray[np.float64] = torch.cat(parts).numpy()
    return scores


def measure(data: Data, target_tpr: float) -> Found:
    """The figures of every score, batch size and ratio.

    They are `auroc` and `fpr` (ID positive; NaN without OOD images), and at the threshold of the
    ID validation stream `rejected` of the ID and `accepted` of the OOD images.
    """
    images = torch.cat([data.known, data.unknown])
    found = {}
    for name, batch_size in PLACES:
        thresholds = [
            _threshold(SCORES[name](data), data.validation, batch_size, target_tpr, seed)
            for seed in range(NUM_ORDERS)
        ]
        for ratio, shares in RATIOS.items():
            figures: Figures = {"auroc": [], "fpr": [], "rejected": [], "accepted": []}
            for seed, threshold in enumerate(thresholds):
                places, is_known = stream(len(data.known), len(data.unknown), shares, seed)
                scores = scores_of(SCORES[name](data), images[places], batch_size)
                for key, value in _judge(scores, is_known, threshold, target_tpr).items():
                    figures[key].append(100 * value)
            found[name, batch_size, ratio] = figures
    return found


def _threshold(
    score: StreamScore, validation: Tensor, batch_size: int, target_tpr: float, seed: int
) -> float:
    places, _ = stream(len(validation), 0, (1, 0), seed)
    return threshold_at_tpr(scores_of(score, validation[places], batch_size), target_tpr)


def _judge(
    scores: NDArray[np.float64], is_known: NDArray[np.bool_], threshold: float, target_tpr: float
) -> dict[str, float]:
    known, unknown = scores[is_known], scores[~is_known]
    rejected = float(np.mean(known < threshold))
    if not len(unknown):
        return {"auroc": np.nan, "fpr": np.nan, "rejected": rejected, "accepted": np.nan}
    figures = ood_metrics(known, unknown, target_tpr)
    accepted = float(np.mean(unknown >= threshold))
    return {
        "auroc": figures["auroc"],
        "fpr": figures["fpr_at_tpr"],
        "rejected": rejected,
        "accepted": accepted,
    }


def tables(found: Found) -> list[str]:
    """Markdown tables: AUROC and FPR, the gain over `neg_label`, and what the thresholds do."""
    mixed = [ratio for ratio in RATIOS if ratio != "ID only"]
    gains = {
        (*place, ratio): {"auroc": _gain(found, place, ratio)}
        for place in PLACES[1:]
        for ratio in mixed
    }
    return [
        f"AUROC, FPR by ID:OOD in percent, mean (std) over {NUM_ORDERS} orders:",
        _table(found, mixed, "auroc", "fpr"),
        "AUROC minus that of `neg_label` on the same streams:",
        _table(gains, mixed, "auroc"),
        "At the threshold of the ID validation stream, ID images rejected, OOD images accepted:",
        _table(found, list(RATIOS), "rejected", "accepted"),
    ]


def confident(data: Data) -> str:
    """Which images `ada_neg` takes for ID and for OOD, by their static score."""
    settings = AdaNegSettings()
    high = settings.threshold + settings.gap * (1 - settings.threshold)
    low = settings.threshold * (1 - settings.gap)
    parts = []
    for name, images in (("ID", data.known), ("OOD", data.unknown)):
        scores = Static(data.classes, data.mined).step(images).numpy()
        above, below = 100 * np.mean(scores > high), 100 * np.mean(scores < low)
        parts.append(f"of the {name} images {above:.1f} % as ID and {below:.1f} % as OOD")
    return f"`ada_neg` keeps {', '.join(parts)} (`neg_label` above {high:g}, below {low:g})."


def _gain(found: Found, place: tuple[str, int], ratio: str) -> list[float]:
    pairs = zip(found[*place, ratio]["auroc"], found[*STATIC, ratio]["auroc"], strict=True)
    return [own - static for own, static in pairs]


def _table(found: Found, ratios: list[str], *names: str) -> str:
    places = dict.fromkeys((name, batch_size) for name, batch_size, _ in found)
    rows = [
        [f"`{name}`", str(batch_size), *(_cell(found[name, batch_size, r], names) for r in ratios)]
        for name, batch_size in places
    ]
    return markdown_table(["score", "images a batch", *ratios], rows, num_texts=1)


def _cell(figures: Figures, names: Sequence[str]) -> str:
    values = [figures[name] for name in names if not np.isnan(figures[name]).any()]
    return ", ".join(f"{np.mean(v):.1f} ({np.std(v, ddof=1):.1f})" for v in values)
