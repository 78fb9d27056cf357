"""The method of docs/new_method.md, put in place in a copy of the package, trains and is judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pipelines/methods/logit_norm.py", "conf/method/logit_norm.yaml")
# In the copy: the configuration as the command line gives it, one loss, and one training.
RUN = """
import json
import torch
from pipelines.config import load
from pipelines.methods import METHODS
from pipelines.methods.base import Batch, Outputs
from pipelines.settings.config import PipelineConfig
from pipelines.finetune.loop import TrainingJob, train_in_process
from tests.small_clip import small_clip, toy_data

every = load(PipelineConfig, "pipeline", ["methods=all"]).methods
words = ["methods=[coop,logit_norm]", "methods.logit_norm.training.epochs=20",
         "methods.logit_norm.training.lr=0.05", "methods.logit_norm.tau=0.5"]
method = load(PipelineConfig, "pipeline", words).methods["logit_norm"]
logits, labels = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0, 0])
given = Outputs(logits, logits, logits, None, None, None, 1.0)
losses, report = METHODS["logit_norm"].loss(given, Batch(labels), method)
data = toy_data()
trained = train_in_process(TrainingJob(method, 0), data, small_clip())
similarity = trained.predictor.similarity(data.validation_features)
right = trained.predictor.predicted(similarity) == data.validation_labels
print(json.dumps({
    "in all": "logit_norm" in every and "coop" in every,
    "loss": float(losses["logit_norm"]), "length": report["length"],
    "first": trained.history[0]["loss"], "last": trained.history[-1]["loss"],
    "accuracy": float(right.mean()), "sweep": method.head.trainable,
}))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package with the page's two blocks written where the page says."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("pipelines", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "small_clip.py", tmp_path / "tests")
    page = (ROOT / "docs" / "new_method.md").read_text()
    blocks = dict(re.findall(r"^`([\w/]+\.\w+)`\n\n```\w+\n(.*?)^```$", page, re.M | re.S))
    assert tuple(blocks) == FILES
    for name, content in blocks.items():
        assert not (ROOT / name).exists()  # the exercise is still one
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.slow
def test_the_page_adds_a_method_with_one_file_and_one_yaml(copy: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["in all"]
    assert found["sweep"]  # so that sweep=default gives it a budget
    # By hand: (3, 4) / 5 and (1, 0), over tau = 0.5.
    terms = [np.log1p(np.exp((0.8 - 0.6) / 0.5)), np.log1p(np.exp(-1 / 0.5))]
    assert found["loss"] == pytest.approx(np.mean(terms), rel=1e-6)
    assert found["length"] == pytest.approx(3.0)
    assert found["last"] < 0.8 * found["first"]
    assert found["accuracy"] > 0.5  # of four classes
