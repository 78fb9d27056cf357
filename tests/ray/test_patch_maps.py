"""A run that keeps local features maps its mistakes, and its model explains what it judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config import load
from pipelines.data.digits import DigitsSource
from pipelines.data.storage import Storage
from pipelines.pipeline import run
from pipelines.pipeline.patches import NO_LOCAL, maps_of
from pipelines.predict.explain import explain_images
from pipelines.predict.stage import load_detector
from pipelines.run import Run
from pipelines.run.observer import Quiet
from pipelines.settings.config import PipelineConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    # MLflow's note on models that take images alone.
    pytest.mark.filterwarnings("ignore:.*An input example was not provided:UserWarning"),
]


def words(storage: Path, files: tuple[Path, Path], *others: str) -> list[str]:
    architecture, weights = files
    return [
        "benchmark=digits",
        f"backbone.config={architecture}",
        f"backbone.path={weights}",
        "backbone.kind=open_clip",
        "backbone.name=tiny",
        "methods=[zero_shot]",
        "sweep=none",
        "seeds=1",
        "training=in_process",
        "evaluate.num_resamples=100",
        f"storage={storage}",
        *others,
    ]


@pytest.fixture(scope="module")
def done(
    backbone_files: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    storage = tmp_path_factory.mktemp("maps") / "storage"
    asked = words(storage, backbone_files["vit"], "scores=[gl_mcm]", "register_as.examples=3")
    return run(load(PipelineConfig, "pipeline", asked), Quiet())


def test_the_report_maps_what_gl_mcm_judged(done: Run) -> None:
    (row,) = done.metrics.rows
    page = done.storage.read_bytes("runs", done.id, "report.html").decode()
    section = page[page.index('<section id="where">') :]
    section = section[: section.index("</section>")]
    assert 0 < section.count("<img") <= 12
    assert section.count("mcm of 4 x 4 patches") == section.count("<img")
    # The registered model encodes the same images anew, and says the same of them.
    images = [("test", key) for key in done.benchmark.sets["test"].keys[:4]]
    maps = maps_of(done, row, images)
    assert not isinstance(maps, str)
    detector = load_detector("models:/energy-ood@champion", done.storage)
    contents = DigitsSource().read([key for _, key in images])
    verdicts = detector.judge_images(contents).to_pylist()
    only = {"tau": row.params["tau"]}
    wholes = replace(detector, score="mcm", params=only).judge_images(contents)["score"].to_pylist()
    explanations = explain_images(detector, contents)
    for one, other, verdict, whole in zip(maps, explanations, verdicts, wholes, strict=True):
        assert one is not None
        assert other is not None
        assert other.patches is not None
        assert one.values == pytest.approx(other.patches.values, abs=1e-6)
        assert (one.crop == other.patches.crop).all()
        score = whole + row.params["weight"] * other.patches.values.max()
        assert verdict["score"] == pytest.approx(score, abs=1e-12)


def test_the_registered_model_carries_training_images(done: Run) -> None:
    detector = load_detector("models:/energy-ood@champion", done.storage)
    assert detector.examples is not None
    train = done.benchmark.sets["train"]
    labels = dict(zip(train.keys, train.labels, strict=True))
    found = detector.examples
    assert [labels[key] for key in found.keys] == found.labels.tolist()
    assert len(found.keys) == 3 * len(done.benchmark.class_names)
    (content,) = DigitsSource().read([found.keys[4]])
    (explained,) = explain_images(detector, [content])
    assert explained is not None
    assert explained.nearest[0].key == found.keys[4]
    assert explained.nearest[0].cosine == pytest.approx(1, abs=1e-3)


def test_a_run_without_local_features_says_how_to_keep_them(
    done: Run, backbone_files: dict[str, tuple[Path, Path]]
) -> None:
    asked = words(Path(done.storage.root), backbone_files["vit"], "scores=[mcm]")
    plain = run(load(PipelineConfig, "pipeline", asked), Quiet(), last="evaluate")
    (row,) = plain.metrics.rows
    assert maps_of(plain, row, []) == NO_LOCAL
    page = Storage(plain.storage.root).read_bytes("runs", plain.id, "report.html").decode()
    assert f"zero_shot: no map, {NO_LOCAL}." in page
