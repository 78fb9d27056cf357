"""What it takes to add a score, a head with its method, a benchmark: 1, 3 and 1 files of a copy.

All are added to one copy and used in one process, because starting one takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.layers.copies import copy_tree, run, touched

SCORE = '''
def logit_gap(logits: Array, scale: float = 1.0) -> Tensor:
    """The two largest logits' difference, over `scale`."""
    top = as_tensor(logits, "logits", rank=2).topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) / scale


'''
HEAD = '''"""Text features that learn a residual (Yu 2023, TaskRes, equation 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from pipelines.heads import base, rules
from pipelines.heads.base import HeadConfig, HeadContext, HeadOutput, HeadPlugin, Predictor
from pipelines.heads.zero_shot import template_features


class Config(HeadConfig):
    """A residual of the text features."""

    name: Literal["text_residual"] = "text_residual"
    share: float = Field(0.5, gt=0, description="of the residual")


class TextResidual(nn.Module):
    """Image features against text features + share x what is learned."""

    def __init__(
        self, text: Tensor, *, share: float, logit_scale: float, class_names: tuple[str, ...]
    ) -> None:
        """Start from `text` (K, D) itself."""
        super().__init__()
        self.residual = nn.Parameter(torch.zeros_like(text))
        self.register_buffer("text", text, persistent=False)
        self.share = share
        self.logit_scale = logit_scale
        self.class_names = class_names

    def text_features(self) -> Tensor:
        """(K, D) unit length."""
        return F.normalize(self.text + self.share * self.residual, dim=-1)

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Cosines of (N, D) unit features."""
        text = self.text_features()
        return HeadOutput(image_features @ text.T, image_features, text)

    def forward(self, image_features: Tensor) -> Tensor:
        """Similarity (N, K)."""
        return self.encode(image_features).similarity

    def predictor(self) -> Predictor:
        """The text features as they are now."""
        arrays = {"text_features": base.to_numpy(self.text_features())}
        return Predictor("text_residual", arrays, {}, self.logit_scale, self.class_names)


def build(config: Config, context: HeadContext, seed: int) -> TextResidual:
    """The residual starts at 0."""
    return TextResidual(
        template_features(context),
        share=config.share,
        logit_scale=context.backbone.logit_scale,
        class_names=context.class_names,
    )


def similarity(
    arrays: Mapping[str, NDArray[np.float64]],
    settings: Mapping[str, Any],
    features: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The rule of the predictor, in float64."""
    return rules.text_similarity(arrays, settings, rules.unit(features))


PLUGIN = HeadPlugin(Config, build, similarity)
'''
METHOD = '''"""Cross-entropy of a learned residual of the text features (Yu 2023, TaskRes)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.heads import AnyHead
from pipelines.heads.text_residual import Config as ResidualConfig
from pipelines.methods.base import (
    Batch, Losses, MethodConfig, MethodPlugin, Outputs, accuracy, cross_entropy,
)


class Config(MethodConfig):
    """Cross-entropy."""

    name: Literal["text_residual"] = "text_residual"
    head: AnyHead = ResidualConfig()
    score: str = Field("mcm", description="the selection criterion")


def loss(outputs: Outputs, batch: Batch, config: Config) -> Losses:
    """The mean over the images."""
    found = cross_entropy(outputs, batch)
    return {"cross_entropy": found}, {"accuracy": accuracy(outputs, batch)}


PLUGIN = MethodPlugin(Config, loss)
'''
YAML = """# A learned residual of the text features (Yu 2023).
name: text_residual
head: {name: text_residual, share: 0.5}
score: mcm
training: {epochs: 20, batch_size: 96, lr: 0.5, warmup_epochs: 0}
"""
BENCHMARK = """# Digits below four against the others.
name: low_digits
class_names: [zero, one, two, three]
templates: ["a photo of the digit {}."]
notes: A benchmark of a test.
sources:
  digits: {kind: digits}
sets:
  train: {source: digits, classes: id, domains: [plain], splits: [train]}
  validation: {source: digits, classes: id, domains: [plain], splits: [validation]}
  test: {source: digits, classes: id, domains: [plain], splits: [test]}
  validation_ood/six: {source: digits, classes: [six], domains: [plain], splits: [validation]}
  ood/near/nine: {source: digits, classes: [nine], domains: [plain], splits: [test]}
"""
# In the copy: the configuration as the command line gives it, a training, scores, a benchmark.
USED = """
import json
import tempfile
from pathlib import Path
from pipelines.config import load
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import Predictor
from pipelines.score import by_name
from pipelines.settings.config import PipelineConfig, open_checked
from tests.small_clip import small_clip, toy_data

every = load(PipelineConfig, "pipeline", ["methods=all", "scores=all"])
words = ["benchmark=low_digits", "methods=[text_residual]", "scores=[msp,logit_gap]",
         "methods.text_residual.score=logit_gap", "sweep=none"]
config = load(PipelineConfig, "pipeline", words)
data = toy_data()
trained = train_in_process(TrainingJob(config.methods["text_residual"], 0), data, small_clip())
with tempfile.TemporaryDirectory() as folder:
    trained.predictor.save(Path(folder))
    loaded = Predictor.load(Path(folder))
inputs = by_name.inputs_of(loaded, data.validation_features)
scores = by_name.score_rows("logit_gap", inputs, {"scale": 2.0}, {})
right = inputs.logits.argmax(axis=1).numpy() == data.validation_labels
print(json.dumps({
    "methods": list(every.methods), "scores": list(every.scores),
    "first": trained.history[0]["loss"], "last": trained.history[-1]["loss"],
    "accuracy": float(right.mean()),
    "rows": scores.tolist(), "logits": inputs.logits.tolist(),
    "sets": {name: len(chosen.keys) for name, chosen in open_checked(config).sets.items()},
}))
"""


def add_score(tree: Path) -> None:
    """A function and its row."""
    path = tree / "pipelines/ood/scores.py"
    before, table, after = path.read_text().partition("SCORES: ")
    row = '        "msp": Entry(msp, ("logits",)),\n'
    assert after.count(row) == 1
    new = f'{row}        "logit_gap": Entry(logit_gap, ("logits",)),\n'
    path.write_text(before + SCORE.lstrip("\n") + table + after.replace(row, new))


def add_head_with_method(tree: Path) -> None:
    """Two modules and a YAML."""
    (tree / "pipelines/heads/text_residual.py").write_text(HEAD)
    (tree / "pipelines/methods/text_residual.py").write_text(METHOD)
    (tree / "conf/method/text_residual.yaml").write_text(YAML)


def add_benchmark(tree: Path) -> None:
    """A YAML."""
    (tree / "conf/benchmark/low_digits.yaml").write_text(BENCHMARK)


ADDED = (add_score, add_head_with_method, add_benchmark)


@dataclass(frozen=True)
class Extended:
    """The files that each of `ADDED` touched, and what using all of them gave."""

    touched: dict[Callable[[Path], None], set[str]]
    found: dict[str, Any]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extended:
    tree = copy_tree(tmp_path_factory.mktemp("copy"))
    assert touched(tree) == set()
    by_step: dict[Callable[[Path], None], set[str]] = {}
    for add in ADDED:
        before = touched(tree)
        add(tree)
        by_step[add] = touched(tree) - before
    return Extended(by_step, run(tree, USED))


def test_a_score_is_one_file(extended: Extended) -> None:
    assert extended.touched[add_score] == {"pipelines/ood/scores.py"}
    assert "logit_gap" in extended.found["scores"]
    logits = np.sort(np.array(extended.found["logits"]), axis=1)
    gaps = (logits[:, -1] - logits[:, -2]) / 2
    np.testing.assert_allclose(extended.found["rows"], gaps, rtol=1e-4, atol=1e-6)


def test_a_head_with_its_method_is_three_files(extended: Extended) -> None:
    assert len(extended.touched[add_head_with_method]) == 3
    assert "text_residual" in extended.found["methods"]
    assert extended.found["last"] < 0.7 * extended.found["first"]
    assert extended.found["accuracy"] > 0.5  # of four classes


def test_a_benchmark_is_one_file(extended: Extended) -> None:
    assert extended.touched[add_benchmark] == {"conf/benchmark/low_digits.yaml"}
    sets = extended.found["sets"]
    assert set(sets) == {"train", "validation", "test", "validation_ood/six", "ood/near/nine"}
    assert all(count > 10 for count in sets.values())
