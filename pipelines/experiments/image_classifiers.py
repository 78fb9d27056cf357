"""ResNet-56 on CIFAR-10: scores of known and unknown images, the temperature, JPEG copies.

Liu et al. 2020, figures 2 and 3 (histograms of the softmax and of the energy score) and the curve
of FPR at 95 % TPR against the temperature, here on other images: CIFAR-100, Tiny ImageNet,
textures and scenes, cut to 32 x 32. JPEG copies of the ID test images show what lossy compression
costs a network that sees every pixel. Weights and images lie in the folder that ENERGY_OOD_SHARED
names (default ../shared).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones import network
from pipelines.backbones.classifier import ImageClassifier
from pipelines.backbones.encoder import FEATURE, Encoder, Preparer
from pipelines.config import UserError, load
from pipelines.data.images import decode
from pipelines.data.sources import ParquetSource
from pipelines.data.storage import Storage
from pipelines.embed.own_images import FolderJob
from pipelines.ood import auroc, energy, fpr_at_tpr, msp
from pipelines.plots import COLOURS, label, markdown_table, panels, save, write_csv

OTHERS = {
    "CIFAR-100": "cifar100", "Tiny ImageNet": "tinyimagenet", "textures": "dtd10",
    "scenes": "scenes",
}  # fmt: skip
SCORES = {"msp": msp, "energy": energy}
TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
QUALITIES = (95, 90, 75, 50, 25)
BATCH = 250


def run(folder: Path) -> str:
    """Write image_classifiers.png and .csv; return the tables as Markdown.

    Raises:
        UserError: where the weights or the images are missing.
    """
    model = _model()
    known, labels = _images(model, "cifar10")
    inside = _logits(model, known)
    outside = {name: _logits(model, _images(model, file)[0]) for name, file in OTHERS.items()}
    curves = {
        (name, score): [fpr_at_tpr(call(inside, tau), call(rows, tau)) for tau in TEMPERATURES]
        for name, rows in outside.items()
        for score, call in SCORES.items()
    }
    header = ["set", "score", "temperature", "fpr95"]
    rows = [
        (name, score, tau, rate)
        for (name, score), rates in curves.items()
        for tau, rate in zip(TEMPERATURES, rates, strict=True)
    ]
    write_csv(folder / "image_classifiers.csv", header, rows)
    _draw(inside, outside["CIFAR-100"], curves, folder / "image_classifiers.png")
    copies = [("lossless", known), *((f"JPEG, quality {q}", _jpeg(known, q)) for q in QUALITIES)]
    lossy = [(name, *_judged(_logits(model, some), labels, outside)) for name, some in copies]
    chosen = (1.0, 10.0, 100.0, 1000.0)
    temperatures = [
        [name, score, *(100 * rates[TEMPERATURES.index(tau)] for tau in chosen)]
        for (name, score), rates in curves.items()
    ]
    return "\n\n".join(
        (
            "FPR at 95 % TPR in percent:",
            markdown_table(
                ["OOD set", "score", *(f"T = {tau:g}" for tau in chosen)],
                temperatures,
                num_texts=2,
            ),
            "ID accuracy, and AUROC against lossless CIFAR-100, in percent:",
            markdown_table(["ID test images", "accuracy", *SCORES], lossy, num_texts=1),
        )
    )


def _model() -> ImageClassifier:
    config = load(FolderJob, "embed_folder", ["backbone=cifar10_resnet56", "source=none"]).backbone
    with TemporaryDirectory() as place:
        model = network.load(network.resolve(config, Storage.open(place)))
    assert isinstance(model, ImageClassifier)
    return model


def _images(model: ImageClassifier, file: str) -> tuple[list[bytes], NDArray[np.int64]]:
    """The encoded test images of a set, and their classes (-1 where the model has none)."""
    root = Path(os.environ.get("ENERGY_OOD_SHARED", "../shared"), "data", f"{file}.parquet")
    source = ParquetSource(root=str(root))
    rows = [row for row in source.index().to_pylist() if row["split"] == "test"]
    place = {name: number for number, name in enumerate(model.class_names)}
    contents = [c for c in source.read([row["key"] for row in rows]) if isinstance(c, bytes)]
    if len(contents) != len(rows):
        raise UserError(f"{root}: {len(rows) - len(contents)} images cannot be read")
    return contents, np.array([place.get(row["class_name"], -1) for row in rows])


def _logits(model: ImageClassifier, contents: Sequence[bytes]) -> Tensor:
    """(N, K), float64."""
    keys = [str(number) for number in range(len(contents))]
    batches = Preparer(model.crop).batches(keys, contents, BATCH)
    features = Encoder(model, BATCH).encode(batches).columns[FEATURE].astype(np.float64)
    return torch.from_numpy(features @ model.weight.T.astype(np.float64) + model.bias)


def _jpeg(contents: Sequence[bytes], quality: int) -> list[bytes]:
    """JPEG copies of images."""
    copies = []
    for content in contents:
        copy = io.BytesIO()
        decode(content).save(copy, "JPEG", quality=quality)
        copies.append(copy.getvalue())
    return copies


def _judged(
    logits: Tensor, labels: NDArray[np.int64], outside: dict[str, Tensor]
) -> tuple[float, ...]:
    """Accuracy, and AUROC of each score against CIFAR-100, in percent."""
    accuracy = float((logits.argmax(dim=1).numpy() == labels).mean())
    areas = (auroc(call(logits), call(outside["CIFAR-100"])) for call in SCORES.values())
    return tuple(100 * value for value in (accuracy, *areas))


def _draw(
    inside: Tensor,
    outside: Tensor,
    curves: dict[tuple[str, str], list[float]],
    path: Path,
) -> None:
    figure, (softmax, energies, temperatures) = panels(3)
    for panel, (name, call) in zip((softmax, energies), SCORES.items(), strict=True):
        sides = {"CIFAR-10": call(inside).numpy(), "CIFAR-100": call(outside).numpy()}
        edges = np.histogram_bin_edges(np.concatenate(list(sides.values())), bins=40).tolist()
        for (side, values), colour in zip(sides.items(), COLOURS, strict=False):
            panel.hist(
                values, edges, density=True, alpha=0.5, color=colour,
                label=f"{side}, mean {values.mean():.2f}",
            )  # fmt: skip
        area = 100 * auroc(*sides.values())
        label(panel, title=f"{name}, AUROC {area:.1f} %", x=name, y="density")
        panel.legend(frameon=False, fontsize=7)
    for (name, score), rates in curves.items():
        colour = COLOURS[list(OTHERS).index(name) % len(COLOURS)]
        style = "-" if score == "energy" else ":"
        percent = [100 * rate for rate in rates]
        temperatures.plot(TEMPERATURES, percent, style, color=colour, label=f"{name}, {score}")
    temperatures.set(xscale="log", ylim=(0, 104))
    label(temperatures, title="", x="temperature T", y="FPR at 95 % TPR, %")
    temperatures.legend(frameon=False, fontsize=6, ncol=2, loc="lower right")
    save(figure, path)
