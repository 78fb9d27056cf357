"""Speed and memory of the maths layer on large inputs, beside scikit-learn and pytorch-ood."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor
from torch.nn import functional

from pipelines.backbones.threads import torch_threads
from pipelines.heads import Predictor
from pipelines.ood import (
    FITTED_SCORES,
    KNN,
    SCORES,
    Bounded,
    FittedRecord,
    ScoreHistogram,
    delta_energy,
    delta_energy_grid,
    histogram_metrics,
    merge_all,
    ood_metrics,
)
from pipelines.ood.negatives import NegativeLabels, mine_negatives
from pipelines.ood.statistics import FloatArray
from pipelines.score.judge import BLOCK_ROWS, judge
from pipelines.speed.measure import Row, compare, compare_memory, with_note

log = logging.getLogger(__name__)

_TAUS = tuple(np.geomspace(0.01, 2.0, 20).tolist())
_CS = (1, 2, 3, 5, 10)
_LOW, _HIGH = -6.0, 7.0  # of the histograms


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """Measure everything; about ten minutes and 10 GiB at `scale` 1, both in proportion to it.

    Args:
        scale: Factor on the number of rows of every input, in (0, 1].
        only: Measure the parts alone whose function's name holds this, `exact_metrics` say.

    Raises:
        ValueError: `scale` is out of range.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must lie in (0, 1], came {scale}")
    suites = (
        _delta_energy, _grid, _negative_words, _knn, _exact_metrics, _histograms, _scores,
        _fitted_scores,
    )  # fmt: skip
    rows = []
    for suite in (part for part in suites if only in part.__name__):
        for row in suite(scale):
            log.info("%s: ratio %s", row.name, row.ratio)
            rows.append(row)
    return rows


def _delta_energy(scale: float) -> Iterator[Row]:
    similarity = _similarity(_size(1_000_000, scale), 1000)
    for c in (1, 2):
        yield compare(
            f"delta_energy c={c} {_shape(similarity)} float32",
            partial(delta_energy, similarity, c=c),
            reference="torch.logsumexp",
            reference_call=lambda: torch.logsumexp(similarity, dim=1),
            limit=1.25,
        )
    yield compare_memory(
        f"delta_energy c=2 {_shape(similarity)}: extra memory",
        lambda: delta_energy(similarity, c=2),
        reference="its input",
        reference_bytes=similarity.nbytes,
        limit=0.05,
    )


def _grid(scale: float) -> Iterator[Row]:
    similarity = _similarity(_size(20_000, scale), 1000)
    yield compare(
        f"delta_energy_grid 20 x 5 {_shape(similarity)} float32",
        lambda: delta_energy_grid(similarity, _TAUS, _CS),
        reference="100 separate calls",
        reference_call=lambda: [delta_energy(similarity, t, c) for t in _TAUS for c in _CS],
        limit=0.5,
        repeats=1,
    )
    yield compare_memory(
        "delta_energy_grid with reduce: extra memory",
        lambda: delta_energy_grid(similarity, _TAUS[:2], _CS, reduce=torch.mean),
        reference="its input",
        reference_bytes=similarity.nbytes,
    )


def _negative_words(scale: float) -> Iterator[Row]:
    """Mining and judging of Jiang 2024's size: 10,000 words at 1,000 classes, 512 dimensions."""
    words, classes = (functional.normalize(torch.randn(n, 512), dim=1) for n in (10_000, 1000))
    wide = words.double()
    yield compare(
        f"mine_negatives among {_shape(words)} at {_shape(classes)}",
        lambda: mine_negatives(words, classes),
        reference="its matrix product in float64",
        reference_call=lambda: wide @ classes.double().T,
    )
    images = functional.normalize(torch.randn(_size(20_480, scale), 512), dim=1).numpy()
    names = tuple(f"class {number}" for number in range(len(classes)))
    head = Predictor("zero_shot", {"text_features": classes.numpy()}, {}, 50.0, names)
    records = {"neg_label": NegativeLabels(words)}
    text = torch.cat([wide, classes.double()]).numpy().T

    def product() -> None:
        for start in range(0, len(images), BLOCK_ROWS):
            images[start : start + BLOCK_ROWS].astype(np.float64) @ text

    with torch_threads(1):
        for groups in (1, 100):
            yield compare(
                f"judge {len(images):,} images by neg_label, groups={groups}",
                lambda groups=groups: judge(  # type: ignore[misc]
                    head, {"neg_label": {"tau": 0.01, "groups": groups}}, images, records
                ),
                reference="its matrix product",
                reference_call=product,
                limit=1.2,
            )


def _knn(scale: float) -> Iterator[Row]:
    train = torch.randn(_size(1_000_000, scale), 512)
    queries = torch.randn(_size(1_000, scale), 512)
    fitted = KNN.fit(train, k=50)
    name = f"KNN k=50, {_shape(queries)} against {_shape(train)} float32"
    theirs = _detector("KNN", k=50)
    if theirs is not None:
        theirs.fit_features(train, torch.zeros(len(train), dtype=torch.long))
        yield compare(
            name,
            lambda: fitted(queries),
            reference="pytorch-ood KNN",
            reference_call=lambda: theirs.predict_features(queries),
            repeats=1,
        )
    yield compare_memory(
        f"{name}: extra memory",
        lambda: fitted(queries),
        reference="all distances at once",
        reference_bytes=len(queries) * len(train) * 4,
    )


def _exact_metrics(scale: float) -> Iterator[Row]:
    id_scores, ood_scores = _normal_scores(_size(10_000_000, scale))
    labels = np.repeat([1, 0], [len(id_scores), len(ood_scores)])
    scores = np.concatenate([id_scores, ood_scores])

    def theirs() -> tuple[float, float, float]:
        false, true, _ = roc_curve(labels, scores)
        auroc, aupr = roc_auc_score(labels, scores), average_precision_score(labels, scores)
        return float(auroc), float(aupr), float(false[np.argmax(true >= 0.95)])

    row = compare(
        f"ood_metrics (all six) {len(id_scores):,} + {len(ood_scores):,} scores",
        lambda: ood_metrics(id_scores, ood_scores),
        reference="scikit-learn AUROC + AP + ROC",
        reference_call=theirs,
        limit=0.1,
        repeats=2,
    )
    ours = ood_metrics(id_scores, ood_scores)
    pairs = zip((ours["auroc"], ours["aupr_id"], ours["fpr_at_tpr"]), theirs(), strict=True)
    yield with_note(row, f"largest difference {max(abs(a - b) for a, b in pairs):.1e}")
    yield compare_memory(
        "ood_metrics: extra memory",
        lambda: ood_metrics(id_scores, ood_scores),
        reference="its input",
        reference_bytes=id_scores.nbytes + ood_scores.nbytes,
    )


def _histograms(scale: float) -> Iterator[Row]:
    """The same chunk again and again: the exact metrics stay those of one chunk."""
    sides, repeats = _normal_scores(_size(5_000_000, scale)), 100
    total = f"{repeats * (len(sides[0]) + len(sides[1])):.0e}"

    def chunked() -> dict[str, Bounded]:
        id_histogram, ood_histogram = (
            merge_all(_binned(side) for _ in range(repeats)) for side in sides
        )
        return histogram_metrics(id_histogram, ood_histogram)

    edges = np.linspace(_LOW, _HIGH, 65_537)
    yield compare(
        f"ScoreHistogram of {2 * len(sides[0]):,} scores, 65,536 bins",
        lambda: [_binned(side) for side in sides],
        reference="numpy.histogram",
        reference_call=lambda: [np.histogram(side, edges) for side in sides],
    )
    row = compare_memory(
        f"histogram_metrics of {total} scores in chunks: extra memory",
        chunked,
        reference="one chunk",
        reference_bytes=sides[0].nbytes + sides[1].nbytes,
    )
    exact, found = ood_metrics(*sides), chunked()
    within = all(abs(found[name].value - exact[name]) <= found[name].bound for name in found)
    auroc, fpr = found["auroc"], found["fpr_at_tpr"]
    yield with_note(
        row,
        f"AUROC {auroc.value:.6f} +- {auroc.bound:.0e}, FPR {fpr.value:.6f} +- {fpr.bound:.0e}; "
        f"all six within their bound: {'yes' if within else 'NO'}",
    )


def _scores(scale: float) -> Iterator[Row]:
    logits = 10 * _similarity(_size(50_000, scale), 1000)
    pairs: dict[str, tuple[str, dict[str, object]]] = {
        "msp": ("MaxSoftmax", {}),
        "max_logit": ("MaxLogit", {}),
        "energy": ("EnergyBased", {}),
        "neg_entropy": ("Entropy", {}),
        "gen": ("GEN", {"M": 100}),
    }
    for name, (detector, options) in pairs.items():
        theirs = _detector(detector, **options)
        if theirs is not None:
            yield compare(
                f"{name} {_shape(logits)} float32",
                partial(SCORES[name], logits=logits),
                reference=f"pytorch-ood {detector}",
                reference_call=partial(theirs.predict_logits, logits),
            )


def _fitted_scores(scale: float) -> Iterator[Row]:
    features = torch.randn(_size(50_000, scale), 512)
    labels = torch.arange(len(features)) % min(100, len(features) // 5)
    features[:, :100] += 3 * torch.nn.functional.one_hot(labels, 100)
    weight = torch.randn(100, 512)
    logits = features @ weight.T
    arrays = {"features": features, "labels": labels, "weight": weight, "logits": logits}
    head = {"w": weight, "b": torch.zeros(100), "d": 256}
    pairs: dict[str, tuple[str, dict[str, object]]] = {
        "mahalanobis": ("Mahalanobis", {}),
        "relative_mahalanobis": ("RMD", {}),
        "vim": ("ViM", head),
        "kl_matching": ("KLMatching", {}),
    }
    for name, (detector, options) in pairs.items():
        theirs, row = _detector(detector, **options), FITTED_SCORES[name]
        if theirs is None:
            continue
        rows = arrays[row.input]
        # Their methods end in what ours call the input, features or logits.
        fit = getattr(theirs, f"fit_{row.input}")
        predict = getattr(theirs, f"predict_{row.input}")
        yield compare(
            f"{name}, fit and score {_shape(rows)}, 100 classes",
            partial(_fit_and_score, partial(row.fit, arrays), rows),
            reference=f"pytorch-ood {detector} (float32)",
            reference_call=partial(_fit_and_predict, partial(fit, rows, labels), predict, rows),
            repeats=2,
        )


def _fit_and_score(fit: Callable[[], FittedRecord], rows: Tensor) -> Tensor:
    return fit()(rows)


def _fit_and_predict(
    fit: Callable[[], object], predict: Callable[[Tensor], Tensor], rows: Tensor
) -> Tensor:
    fit()
    return predict(rows)


def _binned(scores: FloatArray) -> ScoreHistogram:
    return ScoreHistogram.from_batch(scores, low=_LOW, high=_HIGH)


def _detector(name: str, **options: object) -> Any:
    """A detector of pytorch-ood without a model, or None where the package is not installed."""
    try:
        import pytorch_ood.detector
    except ImportError:
        log.warning("pytorch-ood is not installed: no comparison with its %s", name)
        return None
    return getattr(pytorch_ood.detector, name)(None, **options)


def _size(rows: int, scale: float) -> int:
    return max(100, int(rows * scale))


def _shape(rows: Tensor) -> str:
    return "(" + ", ".join(f"{size:,}" for size in rows.shape) + ")"


def _similarity(num_rows: int, num_classes: int) -> Tensor:
    """Cosines as CLIP has them, around 0.2; made in place, since they fill much of the memory."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(num_rows, num_classes).normal_(0.2, 0.05, generator=generator)
    return rows.clamp_(-1, 1)


def _normal_scores(size: int) -> tuple[FloatArray, FloatArray]:
    generator = np.random.default_rng(0)
    return generator.normal(1, 1, size), generator.normal(0, 1, size)
