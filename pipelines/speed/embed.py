"""`embed` against a bare single-process loop: same decode, transform, model, batch and threads.

Rates are steady ones: of the images after the first tenth, so that starting Ray and loading the
model count apart. The bare loop is written here without the project's own encoder. Runs
alternate, and medians are compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.compute import ComputeConfig, connect
from pipelines.config import digest
from pipelines.data.sources import as_index
from pipelines.data.storage import Storage
from pipelines.embed import EmbedConfig, embed_source
from pipelines.models.clip import BackboneConfig
from pipelines.speed.measure import Row, with_note

log = logging.getLogger(__name__)

RESNET = {  # the shape of mini_rn_64
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [2, 2, 2, 2], "width": 32, "patch_size": None},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
BATCH = 32
REPEATS = 3


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
    """A model and the images it is measured on."""

    name: str
    architecture: str  # JSON file
    weights: str
    images: Repeated
    share: float  # of the bare loop's images/s that is asked for

    @property
    def backbone(self) -> BackboneConfig:
        """For `embed`."""
        return BackboneConfig(name=self.name, config=self.architecture, path=self.weights)


def run(*, photos: str | None = None, scale: float = 1.0) -> list[Row]:
    """Measure everything; about half an hour on two quiet cores at `scale` 1.

    Args:
        photos: a folder of JPEG photographs; generated ones of 500 x 375 where None.
        scale: factor on the number of images, in (0, 1].

    Raises:
        ValueError: `scale` is out of range.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must lie in (0, 1], came {scale}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, connect(ComputeConfig(num_cpus=4)):
        place = Path(folder)
        subjects = _subjects(place, photos, scale)
        parts: tuple[Callable[[], Iterator[Row]], ...] = (
            lambda: _decoders(subjects[0].images.files),
            *(lambda s=s: _steady(s, place) for s in subjects),
            *(lambda s=s: _two_workers(s, place) for s in subjects),
            lambda: _memory(subjects[1], place, scale),
        )
        for part in parts:
            for row in part():
                log.info("%s: ratio %s", row.name, row.ratio)
                rows.append(row)
    return rows


def _subjects(place: Path, photos: str | None, scale: float) -> list[Subject]:
    large = (
        sorted(str(p) for p in Path(photos).glob("*")) if photos else _generated(place, 375, 500)
    )
    small = _generated(place, 96, 128)
    vit = open_clip.get_model_config("ViT-B-32")
    made = []
    for name, architecture, files, number, share in (
        ("ViT-B-32, photographs", vit, large, 400, 0.95),
        ("small ResNet, 128 x 96 px", RESNET, small, 6000, 0.85),
    ):
        paths = place / f"{digest(name)}.json", place / f"{digest(name)}.safetensors"
        paths[0].write_text(json.dumps(architecture))
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**json.loads(json.dumps(architecture))).state_dict(), paths[1])
        images = Repeated(tuple(files), max(BATCH * 10, int(number * scale)))
        made.append(Subject(name, str(paths[0]), str(paths[1]), images, share))
    return made


def _generated(place: Path, height: int, width: int, number: int = 50) -> list[str]:
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
    return paths


def _bare(subject: Subject, threads: int, rates: Any = None) -> float:
    """Steady images/s of a plain loop: read, decode, transform, stack, encode."""
    torch.set_num_threads(threads)
    architecture = json.loads(Path(subject.architecture).read_text())
    model = open_clip.CLIP(**architecture).eval()
    model.load_state_dict(load_file(subject.weights))
    size = architecture["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(size, is_train=False)
    keys = subject.images.index()["key"].to_pylist()
    seen: list[tuple[float, int]] = []
    with torch.inference_mode():
        for start in range(0, len(keys), BATCH):
            contents = subject.images.read(keys[start : start + BATCH])
            pixels = [transform(Image.open(io.BytesIO(c))) for c in contents]  # type: ignore[arg-type]
            model.encode_image(torch.stack(pixels), normalize=True).numpy()
            seen.append((time.perf_counter(), min(start + BATCH, len(keys))))
    rate = _rate(seen)
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
    total = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return float(total)


def _embed(subject: Subject, place: Path, *, workers: int, threads: int = 1) -> tuple[float, float]:
    """Steady images/s of `embed`, and the seconds until its first shard."""
    seen: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=place) as folder:
        begin = time.perf_counter()
        embed_source(
            subject.images,
            subject.name,
            subject.backbone,
            Storage.open(folder),
            settings=EmbedConfig(batch_size=BATCH, shard_rows=BATCH),
            compute=ComputeConfig(embed_workers=workers, embed_threads=threads),
            on_progress=lambda done, *_: seen.append((time.perf_counter(), done)),
        )
    return _rate(seen), seen[0][0] - begin


def _rate(seen: Sequence[tuple[float, int]]) -> float:
    """Images/s after the first tenth of the images."""
    start = next(item for item in seen if item[1] >= 0.1 * seen[-1][1])
    return (seen[-1][1] - start[1]) / (seen[-1][0] - start[0])


def _steady(subject: Subject, place: Path) -> Iterator[Row]:
    ours, bare, starts = [], [], []
    for _ in range(REPEATS):
        rate, start = _embed(subject, place, workers=1)
        ours.append(rate)
        starts.append(start)
        bare.append(_bare_processes(subject, 1))
    row = _compare(f"embed, {subject.name}, 1 thread", ours, bare, 1 / subject.share)
    yield with_note(row, f"start-up {statistics.median(starts):.1f} s apart")


def _two_workers(subject: Subject, place: Path) -> Iterator[Row]:
    ours, bare = [], []
    for _ in range(REPEATS):
        ours.append(_embed(subject, place, workers=2)[0] / _embed(subject, place, workers=1)[0])
        bare.append(_bare_processes(subject, 2) / _bare_processes(subject, 1))
    gain, reference = statistics.median(ours), statistics.median(bare)
    note = f"{gain:.2f} x with two workers, {reference:.2f} x with two bare processes"
    name = f"two workers over one, {subject.name}"
    yield Row(name, None, "two bare processes over one", None, reference / gain, 1 / 0.9, note)


def _compare(name: str, ours: list[float], bare: list[float], limit: float) -> Row:
    rate, reference = statistics.median(ours), statistics.median(bare)
    note = f"{rate:.1f} against {reference:.1f} images/s, medians of {len(ours)}"
    return Row(name, 1 / rate, "bare loop", 1 / reference, reference / rate, limit, note)


def _decoders(files: Sequence[str]) -> Iterator[Row]:
    """Decoding and cropping to 224 px: Pillow, Pillow's draft mode, torchvision's decoder."""
    contents = [Path(path).read_bytes() for path in files]
    crop = open_clip.image_transform(224, is_train=False).transforms[:2]

    def pillow(content: bytes, *, draft: bool = False) -> np.ndarray[Any, Any]:
        image = Image.open(io.BytesIO(content))
        if draft:
            image.draft("RGB", (448, 448))
        for step in crop:
            image = step(image)
        return np.asarray(image.convert("RGB"))

    def vision(content: bytes) -> np.ndarray[Any, Any]:
        coded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        mode = torchvision.io.ImageReadMode.RGB
        image = Image.fromarray(
            torchvision.io.decode_jpeg(coded, mode=mode).permute(1, 2, 0).numpy()
        )
        for step in crop:
            image = step(image)
        return np.asarray(image)

    exact = [pillow(content).astype(int) for content in contents]
    ways: dict[str, Callable[[bytes], np.ndarray[Any, Any]]] = {
        "Pillow's draft mode": lambda content: pillow(content, draft=True),
        "torchvision's decoder": vision,
    }
    for name, way in ways.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(REPEATS):
            for call, seconds in zip((way, pillow), times, strict=True):
                start = time.perf_counter()
                for content in contents:
                    call(content)
                seconds.append((time.perf_counter() - start) / len(contents))
        pairs = zip(exact, contents, strict=True)
        largest = max(int(np.abs(one - way(content)).max()) for one, content in pairs)
        ours, reference = map(statistics.median, times)
        note = f"{1 / ours:.0f} against {1 / reference:.0f} images/s; largest difference {largest}"
        yield Row(f"decode, {name}", ours, "Pillow", reference, ours / reference, None, note)


def _memory(subject: Subject, place: Path, scale: float) -> Iterator[Row]:
    """Peak memory of driver and workers at 1,000 and at 20,000 images."""
    peaks = []
    sizes = [int(1000 * scale), int(20_000 * scale)]
    for number in sizes:
        images = Repeated(subject.images.files, number)
        with _PeakMemory() as peak:
            larger = Subject(subject.name, subject.architecture, subject.weights, images, 1)
            _embed(larger, place, workers=1)
        peaks.append(peak.largest)
    note = f"{peaks[1] / 2**20:.0f} against {peaks[0] / 2**20:.0f} MiB, object store apart"
    name = f"peak memory at {sizes[1]:,} images"
    yield Row(name, None, f"at {sizes[0]:,}", None, peaks[1] / peaks[0], 1.1, note)


class _PeakMemory:
    """The largest sum of proportional set sizes of this process and its children, sampled."""

    def __init__(self) -> None:
        self.largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            pids = [os.getpid(), *_workers()]
            self.largest = max(self.largest, sum(_private(pid) for pid in pids))


def _workers() -> list[int]:
    """Ray's workers below this process: each names what it runs in its title, `ray::...`."""
    parents: dict[int, int] = {}
    titles: dict[int, bytes] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            # The name in brackets may hold spaces; the parent is the second word after it.
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[pid] = (folder / "cmdline").read_bytes()

    def is_mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, title in titles.items() if title.startswith(b"ray::") and is_mine(pid)]


def _private(pid: int) -> int:
    """Bytes of anonymous and file pages, shared ones in proportion; not the object store's."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return 1024 * (int(sizes.get("Pss_Anon", 0)) + int(sizes.get("Pss_File", 0)))
