"""The tables of ../shared/README.md, through the project's own embed and score stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

# A score's parameters, and AUROC / FPR in percent by column.
Figures = tuple[str, dict[str, float], dict[str, tuple[float, float]]]
TEST_OOD, OTHERS = "ood/far/test_ood", "ood/far/others"
DOMAINS = {"photo": "test"} | {d: f"shifted/{d}" for d in ("art_painting", "cartoon", "sketch")}


@dataclass(frozen=True)
class Known:
    """What ../shared/README.md says of one backbone.

    Attributes:
        files: name of the weights and of their description, without the ending.
        accuracy: of the zero-shot head in percent, by domain; rounded to `rounding`.
        rounding: half of the last digit of `accuracy`, in percent.
        columns: the ID set and the OOD sets of each column of figures.
        scores: the figures, by the name of their row.
    """

    files: str
    accuracy: dict[str, float]
    rounding: float
    columns: dict[str, tuple[str, tuple[str, ...]]]
    scores: dict[str, Figures]


def row(score: str, columns: Iterable[str], figures: str, **params: float) -> Figures:
    """`figures` as the README prints them: AUROC/FPR, one after the other."""
    pairs = [tuple(float(f) for f in pair.split("/")) for pair in figures.split()]
    return score, params, {c: (a, f) for c, (a, f) in zip(columns, pairs, strict=True)}


BOTH = ("all classes", "test_ood")
# Energy on raw cosines at tau = 1 ranks as energy on logits at tau = the logit scale.
MINI = Known(
    files="mini-rn-64",
    accuracy={"photo": 68.1, "art_painting": 27.0, "cartoon": 42.9, "sketch": 37.2},
    rounding=0.05,
    columns={"all classes": ("test", (TEST_OOD, OTHERS)), "test_ood": ("test", (TEST_OOD,))},
    scores={
        "MSP on logits": row("msp", BOTH, "70.1/90.2 71.8/88.2"),
        "MCM tau=1": row("mcm", BOTH, "76.2/82.4 77.9/78.7", tau=1.0),
        "energy on raw cosines": row("energy", BOTH, "79.3/50.8 77.8/52.1", tau=11.489),
        "max cosine": row("max_logit", BOTH, "90.2/32.2 89.4/33.1"),
        "energy on logits": row("energy", BOTH, "90.3/28.8 89.5/30.2", tau=1.0),
        "DeltaEnergy 1, 1": row("delta_energy", BOTH, "89.6/36.2 89.4/36.8", tau=1.0, c=1),
        "DeltaEnergy 1, 2": row("delta_energy", BOTH, "90.2/30.4 89.6/31.7", tau=1.0, c=2),
        "DeltaEnergy 1, 3": row("delta_energy", BOTH, "87.3/30.1 86.5/31.8", tau=1.0, c=3),
        "DeltaEnergy 0.5, 2": row("delta_energy", BOTH, "90.9/32.9 90.7/33.5", tau=0.5, c=2),
        "DeltaEnergy 0.01, 1": row("delta_energy", BOTH, "69.3/91.7 70.5/91.4", tau=0.01, c=1),
    },
)
LIT = Known(
    files="lit_effnet_lite0",
    accuracy={"photo": 79.28, "art_painting": 51.36, "cartoon": 37.00, "sketch": 20.57},
    rounding=0.005,
    columns={domain: (name, (TEST_OOD,)) for domain, name in DOMAINS.items()},
    scores={
        "MSP on logits": row("msp", DOMAINS, "79.8/85.5 58.6/91.4 66.6/87.3 60.6/82.7"),
        "MCM tau=1": row("mcm", DOMAINS, "82.8/79.0 59.7/92.5 68.9/83.4 65.6/78.4", tau=1.0),
        "energy on logits": row(
            "energy", DOMAINS, "90.1/52.6 67.2/87.2 72.8/71.0 71.5/59.0", tau=1.0
        ),
        "max cosine": row("max_logit", DOMAINS, "89.1/61.6 65.9/87.6 72.5/70.5 70.3/64.4"),
        "DeltaEnergy 1, 1": row(
            "delta_energy", DOMAINS, "88.7/62.9 65.5/87.9 72.6/70.1 70.3/65.5", tau=1.0, c=1
        ),
        "DeltaEnergy 1, 2": row(
            "delta_energy", DOMAINS, "88.5/59.1 66.4/87.4 71.8/67.7 73.1/60.8", tau=1.0, c=2
        ),
        "DeltaEnergy 0.5, 2": row(
            "delta_energy", DOMAINS, "88.8/60.1 66.3/87.4 72.1/67.7 73.2/61.5", tau=0.5, c=2
        ),
        "DeltaEnergy 0.01, 1": row(
            "delta_energy", DOMAINS, "79.0/87.1 58.3/90.2 65.2/88.3 55.8/89.5", tau=0.01, c=1
        ),
    },
)
KNOWN = {"mini_rn_64": MINI, "lit_effnet_lite0": LIT}


@pytest.fixture(scope="module")
def scored(
    shared: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Callable[[str], dict[str, Scored]]:
    """The scores of a backbone's zero-shot head, by the name of their row."""

    @functools.cache
    def of(backbone: str) -> dict[str, Scored]:
        return _scored(backbone, shared, tmp_path_factory.mktemp(backbone))

    return of


def _scored(name: str, shared: Path, root: Path) -> dict[str, Scored]:
    known = KNOWN[name]
    words = [
        "benchmark=pacs_known_values",
        f"backbone={name}",
        f"benchmark.root={shared}/data",
        f"backbone.config={shared}/models/{known.files}.json",
        f"backbone.path={shared}/models/{known.files}.safetensors",
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
    keys_of = {label: HeadKey(method=label, seed=0) for label in known.scores}
    heads = [
        HeadScores(key=keys_of[label], address=address, scores={score: params})
        for label, (score, params, _) in known.scores.items()
    ]
    tables = score.read_all(storage, score.run(heads, sets, storage))
    return {label: Scored(tables[key]) for label, key in keys_of.items()}


Of = Callable[[str], dict[str, Scored]]


@pytest.mark.slow
def test_number_of_images(scored: Of) -> None:
    sets = next(iter(scored("mini_rn_64").values())).sets
    assert len(sets["test"]["key"]) == 304
    assert len(sets[TEST_OOD]["key"]) == 865
    assert len(sets[TEST_OOD]["key"]) + len(sets[OTHERS]["key"]) == 1537


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("backbone", KNOWN)
def test_zero_shot_accuracy_within_one_image(scored: Of, backbone: str, domain: str) -> None:
    head, known, name = next(iter(scored(backbone).values())), KNOWN[backbone], DOMAINS[domain]
    allowed = 1 / len(head.sets[name]["key"]) + known.rounding / 100
    assert head.accuracy(name) == pytest.approx(known.accuracy[domain] / 100, abs=allowed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "label", "column"),
    [(b, label, column) for b, k in KNOWN.items() for label in k.scores for column in k.columns],
)
def test_detection(scored: Of, backbone: str, label: str, column: str) -> None:
    known = KNOWN[backbone]
    score, _, figures = known.scores[label]
    inside, outside = known.columns[column]
    head = scored(backbone)[label]
    found = ood_metrics(head.scores(score, inside), head.scores(score, *outside))
    auroc, fpr = figures[column]
    assert 100 * found["auroc"] == pytest.approx(auroc, abs=0.3)
    assert 100 * found["fpr_at_tpr"] == pytest.approx(fpr, abs=1.5)
