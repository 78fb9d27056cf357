"""The table of ../shared/README.md, through the project's own embed and score stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.backbones import network
from pipelines.compute.cluster import ComputeConfig
from pipelines.config import load
from pipelines.data.benchmarks import open_benchmark
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.embed import stage as embed
from pipelines.embed.config import EmbedConfig
from pipelines.evaluate.scored import Scored
from pipelines.finetune import stage as finetune
from pipelines.finetune.loop import TrainingData, TrainingJob
from pipelines.methods.zero_shot import Config as ZeroShot
from pipelines.ood import ood_metrics
from pipelines.records import HeadKey
from pipelines.score import stage as score
from pipelines.score.result import HeadScores
from pipelines.settings.config import PipelineConfig

SCALE = 11.489
ACCURACY = {"test": 68.1, "art_painting": 27.0, "cartoon": 42.9, "sketch": 37.2}
# Score, its parameters, and AUROC / FPR against all classes and against test_ood. Energy on raw
# cosines at tau = 1 ranks as energy on logits at tau = the logit scale.
KNOWN = {
    "MSP on logits": ("msp", {}, (70.1, 90.2), (71.8, 88.2)),
    "MCM tau=1": ("mcm", {"tau": 1.0}, (76.2, 82.4), (77.9, 78.7)),
    "energy on raw cosines": ("energy", {"tau": SCALE}, (79.3, 50.8), (77.8, 52.1)),
    "max cosine": ("max_logit", {}, (90.2, 32.2), (89.4, 33.1)),
    "energy on logits": ("energy", {"tau": 1.0}, (90.3, 28.8), (89.5, 30.2)),
    "DeltaEnergy 1, 1": ("delta_energy", {"tau": 1.0, "c": 1}, (89.6, 36.2), (89.4, 36.8)),
    "DeltaEnergy 1, 2": ("delta_energy", {"tau": 1.0, "c": 2}, (90.2, 30.4), (89.6, 31.7)),
    "DeltaEnergy 1, 3": ("delta_energy", {"tau": 1.0, "c": 3}, (87.3, 30.1), (86.5, 31.8)),
    "DeltaEnergy 0.5, 2": ("delta_energy", {"tau": 0.5, "c": 2}, (90.9, 32.9), (90.7, 33.5)),
    "DeltaEnergy 0.01, 1": ("delta_energy", {"tau": 0.01, "c": 1}, (69.3, 91.7), (70.5, 91.4)),
}


@pytest.fixture(scope="module")
def scored(
    shared: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> dict[str, Scored]:
    """The scores of the zero-shot head, by the name of the score setting."""
    root = tmp_path_factory.mktemp("known")
    words = [
        "benchmark=pacs_known_values",
        "backbone=mini_rn_64",
        f"benchmark.root={shared}/data",
        f"backbone.config={shared}/models/mini-rn-64.json",
        f"backbone.path={shared}/models/mini-rn-64.safetensors",
    ]
    config = load(PipelineConfig, "pipeline", words)
    storage = Storage.open(str(root / "outputs"))
    benchmark = open_benchmark(config.benchmark)
    backbone = network.resolve(config.backbone, storage)
    compute = ComputeConfig()
    keys = benchmark.keys_by_source()
    caches = embed.embed_sources(
        {name: benchmark.sources[name] for name in keys},
        backbone,
        storage,
        settings=EmbedConfig(),
        compute=compute,
        keys=keys,
    )
    sets = FeatureSets(benchmark, caches)
    test = sets.load("test")
    data = TrainingData(
        class_names=benchmark.class_names,
        templates=benchmark.templates,
        features=test.features[:7],
        labels=np.arange(7),
        validation_features=test.features[:0],
        validation_labels=test.labels[:0],
        outliers=None,
        address="known values",
    )
    job = TrainingJob(ZeroShot(), seed=0)
    (address,) = finetune.train(
        [job], data, backbone, storage, compute=compute, mode="in_process"
    )  # fmt: skip
    keys_of = {label: HeadKey(method=label, seed=0) for label in KNOWN}
    heads = [
        HeadScores(key=keys_of[label], address=address, scores={name: params})
        for label, (name, params, *_) in KNOWN.items()
    ]
    tables = score.read_all(storage, score.run(heads, sets, storage))
    return {label: Scored(tables[key]) for label, key in keys_of.items()}


@pytest.mark.slow
def test_number_of_images(scored: dict[str, Scored]) -> None:
    sets = next(iter(scored.values())).sets
    assert len(sets["test"]["key"]) == 304
    assert len(sets["ood/far/test_ood"]["key"]) == 865
    assert len(sets["ood/far/test_ood"]["key"]) + len(sets["ood/far/others"]["key"]) == 1537


@pytest.mark.slow
@pytest.mark.parametrize("domain", ACCURACY)
def test_zero_shot_accuracy_within_one_image(scored: dict[str, Scored], domain: str) -> None:
    name = domain if domain == "test" else f"shifted/{domain}"
    head = next(iter(scored.values()))
    one_image = 1 / len(head.sets[name]["key"])
    # The reference is rounded to 0.1 %.
    assert head.accuracy(name) == pytest.approx(ACCURACY[domain] / 100, abs=one_image + 0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("label", KNOWN)
@pytest.mark.parametrize("column", ["all classes", "test_ood"])
def test_detection(scored: dict[str, Scored], label: str, column: str) -> None:
    name, _, *columns = KNOWN[label]
    auroc, fpr = columns[column == "test_ood"]
    sets = ["ood/far/test_ood"] + (["ood/far/others"] if column == "all classes" else [])
    head = scored[label]
    found = ood_metrics(head.scores(name, "test"), head.scores(name, *sets))
    assert 100 * found["auroc"] == pytest.approx(auroc, abs=0.3)
    assert 100 * found["fpr_at_tpr"] == pytest.approx(fpr, abs=1.5)
