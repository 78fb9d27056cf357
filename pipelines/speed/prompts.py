"""One step of prompt learning, beside the step of the papers' own code.

The text tower is ViT-B/16's with random weights (speed does not depend on them). A step is
forward, backward and update on a batch of cached image features:

- `plain`: every class's prompt through all 77 positions, as CoOp's public code does;
- `shared`: what `pipelines.heads.coop` does;
- `plain_images`: `plain`, and the batch's images encoded anew, as CoOp's public code does too.

Each is timed in a process of its own, so that its peak memory is its own: the highest resident
size during the steps less the size before them.
"""

from __future__ import annotations

import multiprocessing
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipelines.backbones.text_tower import encode_plain, text_tower
from pipelines.config import UserError
from pipelines.heads import HeadContext, build
from pipelines.heads.coop import Config
from pipelines.heads.parallel import Workers
from pipelines.speed import conditional
from pipelines.speed.measure import Row

Kind: TypeAlias = Literal["plain", "shared", "plain_images"]
MODEL = "ViT-B-16"
# Images of one forward pass of `plain_images`; a batch is made of several.
IMAGE_CHUNK = 32


@dataclass(frozen=True)
class Setting:
    """What a step works on."""

    num_classes: int = 100
    num_context: int = 16
    batch_size: int = 256
    threads: int = 2
    repeats: int = 3
    workers: int = 1


@dataclass(frozen=True)
class StepCost:
    """The cost of one step: the least of the repeats, and peak memory above the start.

    `cpu_seconds` is the processor time of all threads, which other work on the machine hardly
    changes; `seconds` is what a clock on the wall says.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class _Backbone:
    """A random backbone as a head needs it."""

    model: Any
    tokenizer: Any
    embed_dim: int
    logit_scale: float = 100.0
    name: str = "random"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def encode_text(self, texts: Any) -> Tensor:
        features: Tensor = self.model.encode_text(self.tokenizer(list(texts)), normalize=True)
        return features


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """A step beside the papers' own, its memory, many classes, and two workers.

    Args:
        scale: factor on the number of classes, in (0, 1].
        only: a name of `PARTS`; empty: all of them.

    Raises:
        UserError: for an unknown part.
    """
    if only and only not in PARTS:
        raise UserError(f"only={only}: no such part; allowed: {', '.join(PARTS)}")
    return [row for name, part in PARTS.items() if only in ("", name) for row in part(scale)]


def _step(scale: float) -> list[Row]:
    """One step and its memory, beside the plain step of the same prompts."""
    few = Setting(num_classes=max(2, round(100 * scale)))
    shared, plain = measure("shared", few), measure("plain", few)
    name = f"step, {few.num_classes} classes"
    return [
        _seconds(name, shared, "plain 77-token step", plain, 0.08),
        _bytes(f"{name}: peak memory", shared.peak_bytes, "plain step", plain.peak_bytes, 0.2),
    ]


def _images(scale: float) -> list[Row]:
    """The whole gain: features cached and the text shared, beside neither."""
    few = Setting(num_classes=max(2, round(100 * scale)), repeats=1)
    shared, images = measure("shared", replace(few, repeats=3)), measure("plain_images", few)
    name = f"step, {few.num_classes} classes"
    return [_seconds(name, shared, "plain step that encodes its images too", images, None)]


def _many(scale: float) -> list[Row]:
    """Many classes: memory, and the classes divided between two workers."""
    many = Setting(num_classes=max(2, round(1000 * scale)), threads=1, repeats=2)
    one, two = measure("shared", many), measure("shared", replace(many, workers=2))
    name = f"step, {many.num_classes} classes"
    return [
        _bytes(f"{name}: peak memory", one.peak_bytes, "4 GiB", 4 * 2**30, 1.0),
        _seconds(f"{name}, two workers", two, "one worker", one, 1 / 1.6),
    ]


def _workers(scale: float) -> list[Row]:
    """From which number of classes two class-parallel workers pay, one thread each."""
    rows = []
    for classes in (4, 16, 64, 256):
        setting = Setting(num_classes=max(2, round(classes * scale)), threads=1)
        one, two = measure("shared", setting), measure("shared", replace(setting, workers=2))
        name = f"step, {setting.num_classes} classes, two workers"
        rows.append(_seconds(name, two, "one worker", one, None))
    return rows


PARTS: dict[str, Callable[[float], list[Row]]] = {
    "step": _step,
    "images": _images,
    "many": _many,
    "workers": _workers,
    "conditional": conditional.rows,
}


def _seconds(
    name: str, ours: StepCost, reference: str, theirs: StepCost, limit: float | None
) -> Row:
    cpu = f"processor time {ours.cpu_seconds:.2f} s beside {theirs.cpu_seconds:.2f} s"
    ratio = ours.seconds / theirs.seconds
    return Row(name, ours.seconds, reference, theirs.seconds, ratio, limit, cpu)


def _bytes(name: str, ours: int, reference: str, theirs: int, limit: float) -> Row:
    note = f"{ours >> 20} MiB beside {theirs >> 20} MiB"
    return Row(name, None, reference, None, ours / theirs, limit, note)


def measure(kind: Kind, setting: Setting) -> StepCost:
    """The cost of one step, in processes of its own (the slowest and the largest of them)."""
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    with context.Pool(setting.workers, maxtasksperchild=1) as pool:
        tasks = [(kind, setting, rank, port) for rank in range(setting.workers)]
        costs = pool.starmap(_measure_here, tasks, chunksize=1)
    return StepCost(
        max(cost.seconds for cost in costs),
        max(cost.cpu_seconds for cost in costs),
        max(cost.peak_bytes for cost in costs),
    )


def class_names(count: int) -> tuple[str, ...]:
    """Names of one to three tokens, in equal shares."""
    words = ("dog", "red cat", "old grey owl")
    return tuple(words[number % 3] for number in range(count))


def _measure_here(kind: Kind, setting: Setting, rank: int, port: int) -> StepCost:
    torch.set_num_threads(setting.threads)
    if setting.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=setting.workers
        )
    step = _prepare(kind, setting, Workers(rank, setting.workers, "classes"))
    before = _reset_peak()
    times = []
    for _ in range(setting.repeats):
        start, busy = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - start, time.process_time() - busy))
    seconds, cpu_seconds = (min(column) for column in zip(*times, strict=True))
    cost = StepCost(seconds, cpu_seconds, max(0, _peak() - before))
    if setting.workers > 1:
        dist.destroy_process_group()
    return cost


def _prepare(kind: Kind, setting: Setting, workers: Workers) -> Callable[[], None]:
    torch.manual_seed(0)
    backbone = _backbone(images=kind == "plain_images")
    features = F.normalize(torch.randn(setting.batch_size, backbone.embed_dim), dim=-1)
    labels = torch.randint(setting.num_classes, (setting.batch_size,))
    names = class_names(setting.num_classes)
    config = Config(num_context=setting.num_context)
    head = build(config, HeadContext(backbone, names, ("{}",), features, labels), 0)
    head.workers = workers
    images = torch.randn(IMAGE_CHUNK, 3, 224, 224) if kind == "plain_images" else None
    encode = head.text_features if kind == "shared" else _plain_encoder(head, backbone, names)
    optimizer = torch.optim.SGD([head.context], lr=1e-3)

    def step() -> None:
        batch = features if images is None else _encode_images(backbone, images, len(labels))
        optimizer.zero_grad()
        logits = batch @ encode().T * backbone.logit_scale
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        workers.add_gradients([head.context])
        optimizer.step()

    return step


def _backbone(*, images: bool) -> _Backbone:
    description = open_clip.get_model_config(MODEL)
    if not images:
        # A tower that is never run: as small as open_clip builds one.
        description["vision_cfg"] = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    model = open_clip.CLIP(**description).eval().requires_grad_(False)
    return _Backbone(model, open_clip.get_tokenizer(MODEL), description["embed_dim"])


def _plain_encoder(head: Any, backbone: _Backbone, names: tuple[str, ...]) -> Callable[[], Tensor]:
    """Text features (K, D) by all positions of every prompt."""
    tower = text_tower(backbone.model)
    tokens = backbone.tokenizer([f"{name}." for name in names])
    words = tower.embed(tokens).detach()
    ends = tower.end_positions(tokens).to(words.device)

    def encode() -> Tensor:
        context = head.context.expand(len(words), -1, -1)
        prompts = torch.cat((words[:, :1], context, words[:, 1:]), dim=1)
        prompts = prompts[:, : tower.context_length]
        return F.normalize(encode_plain(tower, prompts, ends + context.shape[1]), dim=-1)

    return encode


def _encode_images(backbone: _Backbone, images: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        passes = [backbone.model.encode_image(images) for _ in range(-(-count // len(images)))]
    return F.normalize(torch.cat(passes)[:count], dim=-1)


def _reset_peak() -> int:
    """Forget the process's peak size; returns the size now, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
