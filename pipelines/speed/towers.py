"""What an image tower's layout, fusion, compiler and precision cost and gain, on the CPU.

Each way of running a network is measured in turns with all others, on the same pixels at the same
number of threads, and its features are compared with those of the plain float32 loop. Weights are
random: they decide no speed. onnxruntime is an extra (`embed.engine=onnxruntime`), OpenVINO a
yardstick; where they are not installed their rows say so.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from pipelines.backbones.threads import torch_threads
from pipelines.backbones.tower import reduce_precision
from pipelines.speed.measure import Row, named, seconds_of

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]
REPEATS = 5
PLAIN, CHANNELS_LAST = "channels first", "channels last"


@dataclass(frozen=True)
class Network:
    """A tower and the images that it is measured on.

    Attributes:
        build: the network, pixels to features, in eval mode.
        size: side of an image in pixels.
        batch: images of a call.
    """

    build: Callable[[], nn.Module]
    size: int
    batch: int = 16


def _vit() -> nn.Module:
    import open_clip

    visual: nn.Module = open_clip.create_model("ViT-B-32", pretrained=None).visual
    return visual


def _resnet() -> nn.Module:
    from torchvision import models

    network: nn.Module = models.resnet50()
    network.set_submodule("fc", nn.Identity())
    return network


def _efficientnet() -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    return network


NETWORKS: Mapping[str, Network] = {
    "ViT-B-32": Network(_vit, 224),
    "ResNet-50": Network(_resnet, 224),
    "EfficientNet-Lite0": Network(_efficientnet, 192),
}


def _eager(network: nn.Module, pixels: Tensor, place: Path) -> Encode:  # noqa: ARG001
    return network


def _channels_last(network: nn.Module, pixels: Tensor, place: Path) -> Encode:  # noqa: ARG001
    network.to(memory_format=torch.channels_last)
    return lambda x: network(x.contiguous(memory_format=torch.channels_last))


def _folded(network: nn.Module, pixels: Tensor, place: Path) -> Encode:
    """Batch normalisation folded into the convolutions before it."""
    from torch.fx.experimental.optimization import fuse

    return _channels_last(fuse(network), pixels, place)


def _compiled(network: nn.Module, pixels: Tensor, place: Path) -> Encode:
    _channels_last(network, pixels, place)
    compiled = torch.compile(network, dynamic=False)
    return lambda x: compiled(x.contiguous(memory_format=torch.channels_last))


def _bf16(network: nn.Module, pixels: Tensor, place: Path) -> Encode:
    """As `precision=bf16` of a backbone: weights in bfloat16, normalisation in float32."""
    _channels_last(network, pixels, place)
    reduce_precision(network, torch.bfloat16)
    return lambda x: network(x.to(torch.bfloat16, memory_format=torch.channels_last)).float()


def _autocast(network: nn.Module, pixels: Tensor, place: Path) -> Encode:
    run = _channels_last(network, pixels, place)

    def encode(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x).float()

    return encode


def _onnxruntime(network: nn.Module, pixels: Tensor, place: Path) -> Encode:
    import onnxruntime

    path = place / "network.onnx"
    program = torch.onnx.export(network, (pixels,), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(network: nn.Module, pixels: Tensor, place: Path) -> Encode:  # noqa: ARG001
    import openvino  # type: ignore[import-not-found]

    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.convert_model(network, example_input=pixels)
    compiled = openvino.compile_model(model, "CPU", hints)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


# Each makes, of a fresh network, the call that is measured.
WAYS: Mapping[str, Callable[[nn.Module, Tensor, Path], Encode]] = {
    PLAIN: _eager,
    CHANNELS_LAST: _channels_last,
    "channels last, normalisation folded": _folded,
    "channels last, torch.compile": _compiled,
    "bfloat16 weights": _bf16,
    "bfloat16 autocast": _autocast,
    "onnxruntime": _onnxruntime,
    "OpenVINO": _openvino,
}
# What a way needs that need not be installed.
NEEDS = {"onnxruntime": ("onnx", "onnxruntime", "onnxscript"), "OpenVINO": ("openvino",)}


def run(*, scale: float = 1.0, only: str = "") -> list[Row]:
    """Measure every way for every network; a few minutes on two quiet cores.

    Args:
        scale: factor on the number of images of a call, in (0, 1].
        only: measure the networks alone whose name holds this.

    Raises:
        UserError: no network's name holds `only`.
    """
    chosen = named(NETWORKS, only, "network")
    threads = len(os.sched_getaffinity(0))
    with torch_threads(threads), torch.inference_mode():
        return [row for name in chosen for row in _rows(name, scale, threads)]


def _rows(name: str, scale: float, threads: int) -> Iterator[Row]:
    network = NETWORKS[name]
    batch = max(1, round(scale * network.batch))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, network.size, network.size, generator=generator)
    with TemporaryDirectory() as folder:
        made = {way: _made(way, network, pixels, Path(folder)) for way in WAYS}
    calls = {way: call for way, call in made.items() if not isinstance(call, str)}
    features = {way: call(pixels).double() for way, call in calls.items()}  # the first one is slow
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(REPEATS):
        for way, call in calls.items():
            seconds[way].append(seconds_of(lambda call=call: call(pixels)))  # type: ignore[misc]
    plain = statistics.median(seconds[PLAIN]) / batch
    for way, result in made.items():
        if isinstance(result, str):
            yield Row(f"{name}, {way}", None, PLAIN, plain, None, None, result)
            continue
        each = statistics.median(seconds[way]) / batch
        note = f"{1 / each:.1f} images/s; {_difference(features[way], features[PLAIN])}"
        row = Row(f"{name}, {threads} threads: {way}", each, PLAIN, plain, each / plain, None, note)
        log.info("%s: ratio %s", row.name, row.ratio)
        yield row


def _made(way: str, network: Network, pixels: Tensor, folder: Path) -> Encode | str:
    """The call of a way, or why it cannot be measured here."""
    missing = [name for name in NEEDS.get(way, ()) if importlib.util.find_spec(name) is None]
    if missing:
        return f"not measured: {', '.join(missing)} not installed"
    torch.manual_seed(0)
    fresh = network.build().eval().requires_grad_(False)
    try:
        call = WAYS[way](fresh, pixels, folder)
        call(pixels)
    except Exception as error:  # a compiler or an exporter that is not there, or cannot
        log.warning("%s", way, exc_info=True)
        return f"not measured: {type(error).__name__}"
    return call


def _difference(features: Tensor, plain: Tensor) -> str:
    """How far features are from those of the plain loop."""
    largest = (features - plain).norm(dim=1) / plain.norm(dim=1)
    cosine = torch.cosine_similarity(features, plain, dim=1)
    return f"relative distance at most {largest.max():.1e}, cosine at least {cosine.min():.6f}"
