"""`embed` against a bare single-process loop: same decode, transform, model, batch and threads.

Rates are steady ones: of the images after the first tenth, so that starting Ray and loading the
model count apart. The bare loop is written here without the project's own encoder. Runs
alternate, and medians are compared.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.backbones.description import BackboneConfig
from pipelines.compute.cluster import ComputeConfig, connect
from pipelines.config import digest
from pipelines.data.features import FeatureCache
from pipelines.data.index_table import as_index
from pipelines.data.sources import ParquetSource
from pipelines.data.storage import Storage
from pipelines.embed.config import EmbedConfig, Engine
from pipelines.embed.stage import embed_source
from pipelines.speed.measure import PeakMemory, Row, named

log = logging.getLogger(__name__)

RESNET = {  # the shape of mini_rn_64
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [2, 2, 2, 2], "width": 32, "patch_size": None},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
CROP = open_clip.image_transform(224, is_train=False).transforms[:2]
REPEATS = 3
Decoder = Callable[[bytes], Image.Image]


@dataclass(frozen=True)
class Repeated:
    """The same encoded images over and over, under keys of their own."""

    files: tuple[str, ...]
    number: int

    def fingerprint(self) -> str:
        """Of the names only: the files do not change while they are measured."""
        return digest([self.files, self.number])

    def index(self) -> pa.Table:
        """`number` keys."""
        return as_index(pa.table({"key": [f"{n:08d}" for n in range(self.number)]}))

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """The bytes of the key's number, modulo the number of files."""
        return [Path(self.files[int(key) % len(self.files)]).read_bytes() for key in keys]


@dataclass(frozen=True)
class Subject:
    """A model and the images it is measured on.

    Attributes:
        name: in the rows.
        backbone: for `embed`.
        images: what is encoded.
        batch: images of a call.
        share: of the bare loop's images/s that is asked for.
    """

    name: str
    backbone: BackboneConfig
    images: Repeated
    batch: int
    share: float


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """Measure everything; about 20 minutes on two quiet cores at `scale` 1.

    ViT-B-32 has random weights and works on `data/photos` of the folder that ENERGY_OOD_SHARED
    names (default ../shared), the small ResNet is mini_rn_64 on PACS from there; where the
    folder is missing, generated images and random weights take their place, and the names of
    the rows say so.

    Args:
        scale: factor on the number of images, in (0, 1].
        only: measure the parts alone whose name holds this: decoding, vit, resnet, memory.

    Raises:
        ValueError: `scale` is out of range.
        UserError: no part's name holds `only`.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must lie in (0, 1], came {scale}")
    chosen = named(PARTS, only, "part")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            place = Path(folder, part)
            place.mkdir()
            for row in PARTS[part](place, scale):
                log.info("%s: ratio %s", row.name, row.ratio)
                rows.append(row)
    return rows


def _decoding(place: Path, _scale: float) -> Iterator[Row]:
    return _decoders(photographs(place)[1])


def _vit(place: Path, scale: float) -> Iterator[Row]:
    """Images/s of ViT-B-32 on photographs."""
    name, files = photographs(place)
    backbone = random_weights(place, open_clip.get_model_config("ViT-B-32"))
    images = Repeated(files, _number(320, 16, scale))
    return _throughput(Subject(f"ViT-B-32, {name}", backbone, images, 16, 0.95), place)


def _resnet(place: Path, scale: float) -> Iterator[Row]:
    """Images/s of the small ResNet."""
    return _throughput(_small(place, _number(6400, 64, scale)), place)


def _throughput(subject: Subject, place: Path) -> Iterator[Row]:
    """One worker against a bare loop, and two workers over one against two loops over one.

    All four take turns, so that whatever slows the machine meets them alike.
    """
    ours: dict[int, list[float]] = {1: [], 2: []}
    bare: dict[int, list[float]] = {1: [], 2: []}
    starts = []
    with connect(ComputeConfig(num_cpus=4)):
        for _ in range(REPEATS):
            for number in (1, 2):
                rate, start = embed_rate(subject, place, workers=number)
                ours[number].append(rate)
                starts.append(start)
                bare[number].append(_bare_processes(subject, number))
    yield _compare(subject, ours[1], bare[1], statistics.median(starts))
    gain, reference = (
        statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
        for rates in (ours, bare)
    )
    rates = f"{statistics.median(ours[2]):.1f} against {statistics.median(bare[2]):.1f} images/s"
    note = f"{gain:.2f} x against {reference:.2f} x, {rates}, medians of {REPEATS}"
    name = f"two workers over one, {subject.name}"
    yield Row(name, None, "two bare processes over one", None, reference / gain, 1 / 0.9, note)


def _number(full: int, batch: int, scale: float) -> int:
    """A number of images that gives both workers the same number of batches, two at least."""
    pairs = max(2, round(full * scale / (2 * batch)))
    return pairs * 2 * batch


def _shared(*parts: str) -> Path:
    return Path(os.environ.get("ENERGY_OOD_SHARED", "../shared"), *parts)


def photographs(place: Path) -> tuple[str, tuple[str, ...]]:
    """Photographs with what to call them."""
    found = sorted(str(path.resolve()) for path in _shared("data", "photos").glob("*.JPEG"))
    if found:
        return "photographs", tuple(found)
    return "generated 500 x 375 px", _generated(place, 375, 500)


def _small(place: Path, number: int) -> Subject:
    """mini_rn_64 on PACS photographs, or a model of its shape on generated images."""
    files = _shared("models", "mini-rn-64.json"), _shared("models", "mini-rn-64.safetensors")
    table = _shared("data", "pacs_photo.parquet")
    if not all(path.exists() for path in (*files, table)):
        made, images = random_weights(place, RESNET), Repeated(_generated(place, 96, 128), number)
        return Subject("small ResNet, generated", made, images, 64, 0.85)
    source = ParquetSource(root=str(table))
    names = []
    keys = source.index()["key"].to_pylist()
    for count, content in enumerate(source.read(keys)):
        if isinstance(content, bytes):
            path = place / f"{count:05d}.jpg"
            path.write_bytes(content)
            names.append(str(path))
    architecture, weights = (str(path.resolve()) for path in files)
    backbone = BackboneConfig(name="mini_rn_64", config=architecture, path=weights)
    return Subject("mini_rn_64, PACS photo", backbone, Repeated(tuple(names), number), 64, 0.85)


def random_weights(place: Path, architecture: dict[str, Any]) -> BackboneConfig:
    """An architecture with seeded random weights: speed does not depend on them."""
    paths = place / "model.json", place / "model.safetensors"
    paths[0].write_text(json.dumps(architecture))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**json.loads(json.dumps(architecture))).state_dict(), paths[1])
    return BackboneConfig(name="random", config=str(paths[0]), path=str(paths[1]))


def _generated(place: Path, height: int, width: int, number: int = 50) -> tuple[str, ...]:
    """Seeded JPEG files with structure at several sizes, as photographs have."""
    random = np.random.default_rng(0)
    paths = []
    for index in range(number):
        image = np.zeros((height, width, 3))
        for cells in (3, 12, 48):
            coarse = random.integers(0, 256, (cells, cells, 3), np.uint8)
            layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            image += np.asarray(layer) / 3
        path = place / f"{width}_{index:03d}.jpg"
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return tuple(paths)


def _bare(subject: Subject, threads: int, rates: Any = None) -> float:
    """Steady images/s of a plain loop: read, decode, transform, stack, encode."""
    torch.set_num_threads(threads)
    architecture = json.loads(Path(str(subject.backbone.config)).read_text())
    model = open_clip.CLIP(**architecture).eval()
    model.load_state_dict(load_file(str(subject.backbone.path)))
    model.visual.to(memory_format=torch.channels_last)  # the faster layout, as in suite=towers
    size = architecture["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(size, is_train=False)
    keys = subject.images.index()["key"].to_pylist()
    seen: list[tuple[float, int]] = []
    with torch.inference_mode():
        for start in range(0, len(keys), subject.batch):
            contents = subject.images.read(keys[start : start + subject.batch])
            pixels = [transform(Image.open(io.BytesIO(c))) for c in contents]  # type: ignore[arg-type]
            ready = torch.stack(pixels).contiguous(memory_format=torch.channels_last)
            model.encode_image(ready, normalize=True).numpy()
            seen.append((time.perf_counter(), min(start + subject.batch, len(keys))))
    rate = steady_rate(seen)
    if rates is not None:
        rates.put(rate)
    return rate


def _bare_processes(subject: Subject, number: int) -> float:
    """Images/s of `number` bare loops side by side, each on one thread."""
    context = multiprocessing.get_context("spawn")
    rates = context.Queue()
    processes = [context.Process(target=_bare, args=(subject, 1, rates)) for _ in range(number)]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=900) for _ in processes)
    for process in processes:
        process.join()
    return float(total)


def embed_rate(
    subject: Subject,
    place: Path,
    *,
    workers: int,
    shard_rows: int | None = None,
    engine: Engine = "torch",
) -> tuple[float, float]:
    """Steady images/s of `embed` at one thread a worker, and the seconds until its first shard."""
    # A shard a batch: the time of every batch is seen, and each pays for its own file.
    rows = shard_rows or subject.batch
    with tempfile.TemporaryDirectory(dir=place) as folder:
        begin = time.time()
        cache = embed_source(
            subject.images,
            subject.name,
            subject.backbone,
            Storage.open(folder),
            settings=EmbedConfig(batch_size=subject.batch, shard_rows=rows, engine=engine),
            compute=ComputeConfig(embed_workers=workers, embed_threads=1),
        )
        seen = _written(Path(folder), cache)
    return steady_rate(seen), seen[0][0] - begin


def _written(folder: Path, cache: FeatureCache) -> list[tuple[float, int]]:
    """When each shard's file was written, and the images so far.

    The files tell: the driver hears of several shards at once, the first among them late.
    """
    files = {file.name: file for file in folder.rglob("*.parquet")}
    times = sorted((files[s.file].stat().st_mtime, s.rows) for s in cache.manifest.shards)
    return [(when, sum(rows for _, rows in times[: n + 1])) for n, (when, _) in enumerate(times)]


def steady_rate(seen: Sequence[tuple[float, int]]) -> float:
    """Images/s after the first tenth of the images."""
    start = next(item for item in seen if item[1] >= 0.1 * seen[-1][1])
    return (seen[-1][1] - start[1]) / (seen[-1][0] - start[0])


def _compare(subject: Subject, ours: list[float], bare: list[float], start: float) -> Row:
    rate, reference = statistics.median(ours), statistics.median(bare)
    note = (
        f"{rate:.1f} against {reference:.1f} images/s: {rate / reference:.3f} of it, "
        f"{subject.share:g} asked for; medians of {len(ours)}; start-up {start:.1f} s apart"
    )
    limit, name = 1 / subject.share, f"embed, {subject.name}, 1 thread"
    return Row(name, 1 / rate, "bare loop", 1 / reference, reference / rate, limit, note)


def _decoders(files: Sequence[str]) -> Iterator[Row]:
    """Pillow, Pillow's draft mode, torchvision's decoder: alone, and with the crop to 224 px."""
    contents = [Path(path).read_bytes() for path in files]
    exact = [_cropped(_pillow(content)).astype(int) for content in contents]
    ways: dict[str, Decoder] = {
        "Pillow's draft mode": _draft,
        "torchvision's decoder": _torchvision,
    }
    for name, way in ways.items():
        pairs = zip(exact, contents, strict=True)
        largest = max(int(np.abs(one - _cropped(way(content))).max()) for one, content in pairs)
        verdict = "the same pixels" if largest == 0 else f"pixels differ by up to {largest} of 255"
        for what, step in (("decode", _as_it_is), ("decode and crop", _cropped)):
            ours, reference = _in_turns(way, _pillow, step, contents)
            note = f"{1 / ours:.0f} against {1 / reference:.0f} images/s; {verdict}"
            yield Row(f"{what}, {name}", ours, "Pillow", reference, ours / reference, None, note)


def _in_turns(
    way: Decoder, other: Decoder, step: Callable[[Image.Image], object], contents: Sequence[bytes]
) -> tuple[float, float]:
    """Seconds an image of both decoders with `step`: medians of passes that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for decode, seconds in zip((way, other), times, strict=True):
            start = time.perf_counter()
            for content in contents:
                step(decode(content))
            seconds.append((time.perf_counter() - start) / len(contents))
    return statistics.median(times[0]), statistics.median(times[1])


def _as_it_is(image: Image.Image) -> object:
    return image


def _pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _draft(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (448, 448))  # at least twice what the crop needs, at a share of the pixels
    return image.convert("RGB")


def _torchvision(content: bytes) -> Image.Image:
    coded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels = torchvision.io.decode_jpeg(coded, mode=torchvision.io.ImageReadMode.RGB)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _cropped(image: Image.Image) -> np.ndarray[Any, Any]:
    for step in CROP:
        image = step(image)
    return np.asarray(image)


def _memory(place: Path, scale: float) -> Iterator[Row]:
    """Peak memory of driver and workers at 1,000 and at 20,000 images."""
    peaks = []
    sizes = [max(400, int(1000 * scale)), max(4000, int(20_000 * scale))]
    subject = _small(place, sizes[0])
    for number in sizes:
        larger = replace(subject, images=replace(subject.images, number=number))
        # A Ray of its own for each: nothing of the first is left when the second begins.
        with connect(ComputeConfig(num_cpus=4)), PeakMemory() as peak:
            embed_rate(larger, place, workers=1, shard_rows=200)
        peaks.append(peak.largest)
    note = f"{peaks[1] / 2**20:.0f} against {peaks[0] / 2**20:.0f} MiB (PSS), object store apart"
    name = f"peak memory at {sizes[1]:,} images"
    yield Row(name, None, f"at {sizes[0]:,}", None, peaks[1] / peaks[0], 1.1, note)


PARTS: Mapping[str, Callable[[Path, float], Iterator[Row]]] = {
    "decoding": _decoding,
    "vit": _vit,
    "resnet": _resnet,
    "memory": _memory,
}
