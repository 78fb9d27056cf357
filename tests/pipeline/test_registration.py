"""What is registered where shifted validation images count as ID."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from pipelines.config import ConfigError, load
from pipelines.evaluate.scored import Scored
from pipelines.methods import METHODS
from pipelines.pipeline.registration import full_spectrum
from pipelines.register.choose import champion
from pipelines.register.config import RegisterConfig
from pipelines.settings.config import PipelineConfig, open_checked

SHIFTED = "benchmark.sets.validation_shifted/noisy="
NOISY = SHIFTED + "{source: digits, classes: id, domains: [noisy], splits: [validation]}"
# Number of images, mean score and share of right classes of two methods.
SIZES = {"validation": 200, "validation_shifted/a": 150, "validation_shifted/b": 50,
         "validation_ood/x": 100, "validation_ood/y": 80, "test": 60}  # fmt: skip
STEADY = {
    "validation": (2.0, 0.9),
    "validation_shifted/a": (1.8, 0.9),
    "validation_shifted/b": (1.8, 0.9),
    "validation_ood/x": (0.5, 0),
    "validation_ood/y": (0.6, 0),
    "test": (0, 0),
}
# Better on ID validation, worse on shifted images.
BRITTLE = {**STEADY, "validation": (3.0, 0.9), "validation_shifted/a": (-1.0, 0.9),
           "validation_shifted/b": (-1.0, 0.9)}  # fmt: skip


def table(seed: int, sides: dict[str, tuple[float, float]]) -> Scored:
    random = np.random.default_rng(seed)
    parts = []
    for name, (mean, share) in sides.items():
        size = SIZES[name]
        known = not name.startswith("validation_ood")
        right = random.random(size) < share
        columns = {
            "set": [name] * size,
            "label": np.full(size, 1 if known else -1),
            "predicted": np.where(right, 1, 0),
            "score_mcm": random.normal(mean, 1, size),
        }
        parts.append(pa.table(columns))
    return Scored(pa.concat_tables(parts))


def test_shifted_images_count_as_id_in_accuracy_auroc_and_choice() -> None:
    heads = {"coop": table(0, BRITTLE), "ebm": table(1, STEADY)}
    found = full_spectrum(heads, ["mcm", "energy"])
    names = ["validation", "validation_shifted/a", "validation_shifted/b"]
    for method, head in heads.items():
        sets = head.sets
        known = np.concatenate([sets[name]["score_mcm"] for name in names])
        expected = [
            roc_auc_score(
                np.repeat([1, 0], [len(known), SIZES[other]]),
                np.concatenate([known, sets[other]["score_mcm"]]),
            )
            for other in ("validation_ood/x", "validation_ood/y")
        ]
        assert found[method].validation.keys() == {"mcm"}
        assert found[method].validation["mcm"].auroc == pytest.approx(np.mean(expected), abs=1e-12)
        right = np.concatenate([sets[name]["predicted"] == sets[name]["label"] for name in names])
        assert found[method].accuracy == pytest.approx(right.mean(), abs=1e-12)
    methods = {name: METHODS[name].Config() for name in heads}
    chosen = champion(methods, ["mcm"], found, RegisterConfig(), accuracy_tolerance=0.1)
    assert chosen == ("ebm", "mcm")
    alone = {n: roc_auc_score(np.repeat([1, 0], [200, 100]), np.concatenate(
        [h.sets["validation"]["score_mcm"], h.sets["validation_ood/x"]["score_mcm"]]
    )) for n, h in heads.items()}  # fmt: skip
    assert alone["coop"] > alone["ebm"], "on ID validation alone the other one is better"


@pytest.mark.parametrize("key", ["threshold.known", "register_as.criterion"])
def test_without_shifted_validation_images_one_line_says_so(key: str) -> None:
    words = ["benchmark=digits", "methods=[zero_shot]", f"{key}=full_spectrum"]
    with pytest.raises(ConfigError, match=rf"{key}=full_spectrum: .* no set validation_shifted/"):
        open_checked(load(PipelineConfig, "pipeline", words))
    open_checked(load(PipelineConfig, "pipeline", [*words, NOISY]))
