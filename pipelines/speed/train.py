"""Training networks: our loop against a bare one, two workers against one, and memory.

The bare loop is ResNet-20's step on tensors that are at hand, normalised and channels last: no
image is read, cropped or flipped. Ours reads decoded images from disk and augments them. Both take
turns on the same number of threads.
"""

from __future__ import annotations

import io
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig, Preprocessing
from pipelines.backbones.network_training import NetworkTraining
from pipelines.backbones.threads import torch_threads
from pipelines.compute.cluster import ComputeConfig, connect
from pipelines.config import digest
from pipelines.data.augmentation import Augmentation
from pipelines.data.index_table import as_index
from pipelines.data.storage import Storage
from pipelines.embed.config import EmbedConfig
from pipelines.heads.classifier import Config as Classifier
from pipelines.methods import METHODS
from pipelines.methods.base import TrainingConfig
from pipelines.methods.optimization import optimizer
from pipelines.speed.measure import PeakMemory, Row, compare, named, with_note
from pipelines.train.data import NetworkData, NetworkJob
from pipelines.train.image_set import ImageSet, preparation
from pipelines.train.images import Making, make
from pipelines.train.loop import train_network
from pipelines.train.stage import train

log = logging.getLogger(__name__)

BATCH, CLASSES = 128, 10
BACKBONE = BackboneConfig(
    name="resnet20", kind="cifar", model="resnet20", untrained=True,
    preprocessing=Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
)  # fmt: skip
NAMES = tuple(f"class {number}" for number in range(CLASSES))


@dataclass(frozen=True)
class Noise:
    """Encoded images of noise, each drawn from its number."""

    number: int

    def fingerprint(self) -> str:
        """Of the number: the images follow from it."""
        return digest(["noise", self.number])

    def index(self) -> pa.Table:
        """`number` keys."""
        return as_index(pa.table({"key": [f"{n:08d}" for n in range(self.number)]}))

    def read(self, keys: Sequence[str]) -> list[bytes | Exception]:
        """A BMP of 32 x 32 pixels for each key."""
        return [_encoded(int(key)) for key in keys]


def _encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """Measure everything; about 10 minutes on two quiet cores at `scale` 1.

    Args:
        scale: factor on the number of images, in (0, 1].
        only: measure the parts alone whose name holds this: step, workers, memory.

    Raises:
        UserError: no part's name holds `only`.
    """
    rows: list[Row] = []
    for name in named(PARTS, only, "part"):
        with tempfile.TemporaryDirectory() as folder:
            for row in PARTS[name](Storage.open(folder), scale):
                log.info("%s: ratio %s", row.name, row.ratio)
                rows.append(row)
    return rows


def _data(storage: Storage, batches: int) -> NetworkData:
    """Decoded images on disk, and labels."""
    count = batches * BATCH
    table = make(
        Noise(count),
        storage,
        name="noise",
        keys=None,
        preparation=preparation(BACKBONE, EmbedConfig()),
        making=Making(with_ray=False),
    )
    none = np.zeros(0, np.int64)
    return NetworkData(
        class_names=NAMES,
        images=ImageSet((table,), np.zeros(count, np.int64), np.arange(count)),
        labels=np.arange(count) % CLASSES,
        validation=ImageSet((), none, none),
        validation_labels=none,
        outliers=None,
        address=table.address,
    )


def _job(epochs: int = 1, threads: int = 1) -> NetworkJob:
    how = NetworkTraining(
        start="random", augmentation=Augmentation(crop="pad_crop", pad=4, flip=True)
    )
    training = TrainingConfig(
        epochs=epochs, batch_size=BATCH, lr=0.01, warmup_epochs=0, nesterov=True, threads=threads
    )
    config = METHODS["cross_entropy"].Config
    return NetworkJob(config(head=Classifier(train=how), training=training), 0, BACKBONE)


def _step(storage: Storage, scale: float) -> Iterator[Row]:
    """One worker's images/s against the bare loop's, at one thread and at two."""
    batches = max(2, round(40 * scale))
    data = _data(storage, batches)
    for threads in (1, 2):
        job = _job(threads=threads)
        ours = network.trainable(BACKBONE, NAMES, "random", 0)
        row = compare(
            f"an epoch of {batches} batches, {threads} threads",
            lambda job=job, ours=ours: train_network(job, data, ours),  # type: ignore[misc]
            reference="tensors at hand",
            reference_call=_bare(batches, job, threads),
            limit=1 / 0.9,
        )
        rates = [batches * BATCH / s for s in (row.seconds, row.reference_seconds) if s]
        yield with_note(row, f"{rates[0]:.0f} against {rates[1]:.0f} images/s")


def _bare(batches: int, job: NetworkJob, threads: int) -> Callable[[], None]:
    """The same steps of the same network on tensors that are at hand."""
    bare = network.trainable(BACKBONE, NAMES, "random", 0)
    bare.to(memory_format=torch.channels_last)
    trunk, linear = bare.trunk, bare.linear
    steps = optimizer(job.method.training, [*trunk.parameters(), *linear.parameters()])
    pixels = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % CLASSES

    def epoch() -> None:
        with torch_threads(threads):
            for _ in range(batches):
                steps.zero_grad(set_to_none=True)
                F.cross_entropy(linear(trunk(pixels)), labels).backward()  # type: ignore[no-untyped-call]
                steps.step()

    return epoch


def _workers(storage: Storage, scale: float) -> Iterator[Row]:
    """Seconds of an epoch on two Ray Train workers of one thread over one worker's."""
    batches, epochs, turns = max(2, round(60 * scale)), 4, 2
    data = _data(storage, batches)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with connect(ComputeConfig(num_cpus=4)):
        # In turns, so that both meet the same noise.
        for turn, workers in itertools.product(range(turns), seconds):
            ends: list[float] = []
            train(
                [_job(epochs)],
                data,
                # Another folder each: nothing is found.
                Storage.open(storage.path(f"{workers} workers, turn {turn}")),
                compute=ComputeConfig(train_workers=workers),
                on_report=lambda *_, ends=ends: ends.append(time.perf_counter()),
            )
            # The first epoch holds the start of the workers.
            seconds[workers] += (b - a for a, b in itertools.pairwise(ends))
    # The best, as elsewhere: what disturbs one of two busy cores makes both workers wait.
    best = {workers: min(epochs) for workers, epochs in seconds.items()}
    rates = {workers: batches * BATCH / s for workers, s in best.items()}
    note = f"{rates[2]:.0f} against {rates[1]:.0f} images/s, best of {len(seconds[2])} epochs"
    ratio = best[2] / best[1]
    yield Row("two workers of one thread", best[2], "one", best[1], ratio, 1 / 1.6, note)


def _memory(storage: Storage, scale: float) -> Iterator[Row]:
    """Peak memory of an epoch over ten times as many images; mapped files are no one's own."""
    peaks = {}
    for factor in (1, 10):
        data = _data(storage, max(1, round(16 * scale)) * factor)
        train_network(_job(), data, network.trainable(BACKBONE, NAMES, "random", 0))  # warm
        with PeakMemory(files=False) as peak:
            train_network(_job(), data, network.trainable(BACKBONE, NAMES, "random", 0))
        peaks[factor] = (len(data.labels), peak.largest)
    (few, small), (many, large) = peaks[1], peaks[10]
    note = f"{large / 2**20:.0f} against {small / 2**20:.0f} MiB of anonymous memory"
    yield Row(
        f"peak memory at {many:,} images", None, f"at {few:,}", None, large / small, 1.1, note
    )


PARTS: dict[str, Callable[[Storage, float], Iterator[Row]]] = {
    "step": _step,
    "workers": _workers,
    "memory": _memory,
}
