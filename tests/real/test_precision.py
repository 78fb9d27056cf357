"""What bf16 changes: PACS photo against Caltech101 with mini_rn_64, every score, paired."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoder, Preparer
from pipelines.data.sources import ParquetSource
from pipelines.data.storage import Storage
from pipelines.embed.text import text_features
from pipelines.ood.scores import SCORES

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
ONE_INPUT = [n for n, e in SCORES.items() if e.inputs in (("logits",), ("similarity",))]
pytestmark = pytest.mark.slow  # 600 images through the network, in two precisions
Sides = tuple[NDArray[np.float64], NDArray[np.float64]]


@pytest.fixture(scope="module")
def similarities(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Sides], float]:
    """Similarities (N, K) of ID and OOD rows by precision, and the logit scale."""
    overlap = json.loads((shared / "data" / "pacs_ood_split.json").read_text())["overlap_with_pacs"]
    storage = Storage.open(str(tmp_path_factory.mktemp("storage")))
    contents = []
    for name, left_out in (("pacs_photo", ()), ("caltech101", overlap)):
        source = ParquetSource(root=str(shared / "data" / f"{name}.parquet"))
        rows = source.index().to_pylist()
        keys = [r["key"] for r in rows if r["split"] == "test" and r["class_name"] not in left_out]
        contents.append(source.read(keys))
    files = shared / "models" / "mini-rn-64.json", shared / "models" / "mini-rn-64.safetensors"
    found = {}
    for precision in ("fp32", "bf16"):
        config = BackboneConfig(
            name="mini_rn_64", config=str(files[0]), path=str(files[1]), precision=precision
        )
        loaded = network.load(config)
        texts = text_features(CLASSES, ["a photo of a {}."], config, storage).T.astype(float)
        sides = []
        for side in contents:
            names = [str(number) for number in range(len(side))]
            batches = Preparer(loaded.crop).batches(names, side, 64)
            sides.append(
                Encoder(loaded, 64).encode(batches).columns["feature"].astype(float) @ texts
            )
        found[precision] = (sides[0], sides[1])
    return found, loaded.logit_scale


def test_at_most_one_of_300_predictions_changes(
    similarities: tuple[dict[str, Sides], float],
) -> None:
    found, _ = similarities
    changed = (found["fp32"][0].argmax(axis=1) != found["bf16"][0].argmax(axis=1)).sum()
    print(f"{changed} of {len(found['fp32'][0])} predictions change")
    assert len(found["fp32"][0]) == 304
    assert changed <= 1


@pytest.mark.parametrize("name", ONE_INPUT)
def test_auroc_stays_within_a_tenth_of_a_point(
    name: str, similarities: tuple[dict[str, Sides], float]
) -> None:
    found, scale = similarities
    entry = SCORES[name]
    factor = scale if entry.inputs == ("logits",) else 1.0
    scored = {p: [np.asarray(entry.function(s * factor)) for s in found[p]] for p in found}
    labels = np.repeat([1, 0], [len(side) for side in scored["fp32"]])

    def auroc(precision: str, rows: NDArray[np.int64]) -> float:
        return 100 * float(roc_auc_score(labels[rows], np.concatenate(scored[precision])[rows]))

    random = np.random.default_rng(0)
    sides = [np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)]
    deltas = []
    for _ in range(200):  # the same images for both, stratified
        rows = np.concatenate([random.choice(side, len(side)) for side in sides])
        deltas.append(auroc("bf16", rows) - auroc("fp32", rows))
    whole = np.arange(len(labels))
    delta = auroc("bf16", whole) - auroc("fp32", whole)
    low, high = np.percentile(deltas, [2.5, 97.5])
    print(f"{name}: {auroc('fp32', whole):.3f}, bf16 {delta:+.3f} [{low:+.3f}, {high:+.3f}]")
    assert abs(delta) <= 0.1
