"""`embed` against the best bare loop: channels last in torch, onnxruntime, or OpenVINO.

A bare loop is a process that reads, decodes, crops and encodes the photographs on one thread,
without Ray and without writing a file; `embed` does the same with one worker of one thread. The
loops take turns, start-up is left out of their rates, and medians are compared.
onnxruntime and OpenVINO are measured where they are installed.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.compute.cluster import ComputeConfig, connect
from pipelines.embed.config import Engine
from pipelines.speed import embed, towers
from pipelines.speed.embed import Repeated, Subject
from pipelines.speed.measure import Row, named

log = logging.getLogger(__name__)

REPEATS = 3
BATCH = 16
SHARE = 0.95
# The bare loops that each engine of `embed` is held against, by their names in `suite=towers`.
AGAINST: Mapping[Engine, tuple[str, ...]] = {
    "torch": (towers.CHANNELS_LAST,),
    "onnxruntime": (towers.CHANNELS_LAST, *towers.NEEDS),
}


def _vit(place: Path) -> BackboneConfig:
    return embed.random_weights(place, open_clip.get_model_config("ViT-B-32"))


def _resnet(place: Path) -> BackboneConfig:
    from torchvision import models

    return _classifier(place, models.resnet50(), "torchvision", "resnet50", 224)


def _efficientnet(place: Path) -> BackboneConfig:
    import timm

    name = "tf_efficientnet_lite0"
    return _classifier(place, timm.create_model(name), "timm", name, 192)


def _classifier(
    place: Path, network: nn.Module, kind: str, model: str, size: int
) -> BackboneConfig:
    path = place / "weights.safetensors"
    save_file(network.state_dict(), path)
    half = (0.5, 0.5, 0.5)
    return BackboneConfig(
        name=model,
        kind=kind,
        model=model,
        path=str(path),
        class_names=[f"class {number}" for number in range(1000)],
        preprocessing=Preprocessing(size=size, mean=half, std=half),
    )


@dataclass(frozen=True)
class Measured:
    """A network of `suite=towers`, as a backbone and on a number of photographs.

    Attributes:
        make: the backbone, its weights in a folder.
        images: how many are encoded.
        shard_rows: images of a file of features, so many that a file takes a second to fill.
    """

    make: Callable[[Path], BackboneConfig]
    images: int
    shard_rows: int = BATCH


NETWORKS: Mapping[str, Measured] = {
    "ViT-B-32": Measured(_vit, 160),
    "ResNet-50": Measured(_resnet, 192),
    "EfficientNet-Lite0": Measured(_efficientnet, 960, 6 * BATCH),
}


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """Measure every network; about 20 minutes on two quiet cores at `scale` 1.

    Args:
        scale: factor on the number of images, in (0, 1].
        only: measure the networks alone whose name holds this.

    Raises:
        UserError: no network's name holds `only`.
    """
    rows: list[Row] = []
    for name in named(NETWORKS, only, "network"):
        with tempfile.TemporaryDirectory() as folder, connect(ComputeConfig(num_cpus=4)):
            for row in _rows(name, Path(folder), scale):
                log.info("%s: ratio %s", row.name, row.ratio)
                rows.append(row)
    return rows


def _rows(name: str, place: Path, scale: float) -> Iterator[Row]:
    torch.manual_seed(0)
    shard = NETWORKS[name].shard_rows
    number = max(4, round(scale * NETWORKS[name].images / shard)) * shard
    kind, files = embed.photographs(place)
    images = Repeated(files, number)
    subject = Subject(name, NETWORKS[name].make(place), images, BATCH, SHARE)
    ways = [way for way in AGAINST["onnxruntime"] if _installed(towers.NEEDS.get(way, ()))]
    engines: list[Engine] = ["torch", "onnxruntime"] if "onnxruntime" in ways else ["torch"]
    ours: dict[Engine, list[float]] = {engine: [] for engine in engines}
    bare: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for engine in engines:
            rate, _ = embed.embed_rate(subject, place, workers=1, engine=engine, shard_rows=shard)
            ours[engine].append(rate)
        for way in ways:
            bare[way].append(_bare_process(name, images, way))
    medians = {way: statistics.median(rates) for way, rates in bare.items()}
    listed = ", ".join(f"{way} {rate:.1f}" for way, rate in medians.items())
    for engine in engines:
        best = max((way for way in ways if way in AGAINST[engine]), key=medians.__getitem__)
        rate, reference = statistics.median(ours[engine]), medians[best]
        note = f"{rate:.1f} images/s; bare: {listed}; {SHARE:g} asked for; medians of {REPEATS}"
        row = f"embed, {name}, {kind}, 1 thread, engine={engine}"
        yield Row(row, 1 / rate, best, 1 / reference, reference / rate, 1 / SHARE, note)


def _installed(packages: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def _bare_process(name: str, images: Repeated, way: str) -> float:
    """Steady images/s of a bare loop in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_bare, args=(name, images, way, answers))
    process.start()
    rate = answers.get(timeout=900)
    process.join()
    return float(rate)


def _bare(name: str, images: Repeated, way: str, answers: Any) -> None:
    """Read, decode, crop, stack, encode, batch by batch."""
    torch.set_num_threads(1)
    tower = towers.NETWORKS[name]
    network = tower.build().eval().requires_grad_(False)
    transform = open_clip.image_transform(tower.size, is_train=False)
    keys = images.index()["key"].to_pylist()
    seen: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        example = torch.zeros(BATCH, 3, tower.size, tower.size)
        encode = towers.WAYS[way](network, example, Path(folder))
    with torch.inference_mode():
        for start in range(0, len(keys), BATCH):
            contents = images.read(keys[start : start + BATCH])
            pixels = [transform(Image.open(io.BytesIO(c))) for c in contents]  # type: ignore[arg-type]
            encode(torch.stack(pixels)).numpy()
            seen.append((time.perf_counter(), min(start + BATCH, len(keys))))
    answers.put(embed.steady_rate(seen))
