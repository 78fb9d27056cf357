"""Image towers run by onnxruntime on the CPU, from the same weights and to float32 rounding.

onnxruntime runs convolutional networks faster than torch does, since it folds normalisation into
convolutions and lays their memory out for the CPU (`python -m jobs.benchmark suite=towers`).
A worker exports the tower that it has loaded, so there is no second file of weights to keep or
to trust. Gradients (input steps) and local features stay with torch.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.tower import Encode, Tower
from pipelines.config import UserError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Features are those of torch but for rounding: the largest relative distance that is accepted.
TOLERANCE = 1e-5


class _Features(nn.Module):
    """A tower's features as a module, which is what the exporter takes."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower.features(pixels)


def check(backbone: BackboneConfig, *, on_gpu: bool, local_features: bool) -> None:
    """Refuse what this engine cannot do, before any work.

    Raises:
        UserError: where a package is missing, the work is to be done on a GPU, local features are
            to be kept, or the tower's numbers are not float32.
    """
    word = "embed.engine=onnxruntime"
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{word} needs {', '.join(missing)}: pip install {' '.join(missing)}, or "
            "embed.engine=torch"
        )
    if on_gpu:
        raise UserError(f"{word} works on the CPU: compute.embed_gpus=0, or embed.engine=torch")
    if local_features:
        raise UserError(
            f"{word} gives no local features, which a method or a score of this run reads; "
            "embed.engine=torch does"
        )
    if backbone.precision != "fp32":
        raise UserError(
            f"{word} computes in float32, came backbone.precision={backbone.precision}; "
            "choose one of the two"
        )


def engine(tower: Tower, batch_size: int, threads: int) -> Encode:
    """What encodes batches of one size with onnxruntime.

    Args:
        tower: on the CPU, float32.
        batch_size: B, the images of every call.
        threads: of the CPU.

    Returns:
        Normalised pixels (B, 3, H, W) to features (B, D), as `Tower.encode_image`.

    Raises:
        UserError: where the tower cannot be exported, or its features differ by more than
            rounding (`TOLERANCE`).
    """
    import onnxruntime

    pixels = torch.randn(
        batch_size, 3, *tower.image_size, generator=torch.Generator().manual_seed(0)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tower.onnx")
        _export(tower, pixels, path)
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def encode(pixels: Tensor) -> Tensor:
        (features,) = session.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(features)

    _compare(tower, encode(pixels), tower.encode_image(pixels))
    return encode


def _export(tower: Tower, pixels: Tensor, path: Path) -> None:
    module: Any = _Features(tower).eval()
    # It tells of operators that it could have simplified.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module, (pixels,), dynamo=True, verbose=False, input_names=["pixels"]
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"backbone {tower.name}: cannot be exported for onnxruntime ({reason}); "
            "embed.engine=torch runs it"
        ) from None
    assert program is not None
    program.save(str(path))


def _compare(tower: Tower, features: Tensor, of_torch: Tensor) -> None:
    exact = of_torch.double()
    distances = (features - exact).norm(dim=1) / exact.norm(dim=1)
    if not distances.max() <= TOLERANCE:  # nor where it is no number
        raise UserError(
            f"backbone {tower.name}: onnxruntime's features are {distances.max():.1e} from "
            f"torch's, allowed are {TOLERANCE:g}; embed.engine=torch runs it"
        )
