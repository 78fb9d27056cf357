from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.backbones import network
from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError
from pipelines.data.storage import Storage
from pipelines.evaluate.metrics import Threshold
from pipelines.heads import Predictor
from pipelines.predict.stage import PredictConfig, load_detector, run
from pipelines.register.config import RegisterConfig
from pipelines.register.detector import Detector
from pipelines.register.result import RegisterResult
from pipelines.register.stage import Candidate, register
from pipelines.score.judge import judge

PARAMS = {"tau": 0.07, "c": 2}
THRESHOLD = Threshold(value=1.25, low=1.0, high=1.5, num_images=400, rule="conformal")
NAMES = ("zero", "one dog", "two cats", "three", "four")


def unit(seed: int, rows: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Registered:
    candidate: Candidate
    run_id: str
    results: list[RegisterResult]
    image_features: np.ndarray


@pytest.fixture(scope="module")
def registered(mlflow_store, backbone_files, tmp_path_factory) -> Registered:
    """One candidate registered twice, whose own files are then deleted."""
    folder = tmp_path_factory.mktemp("backbone")
    files = [Path(shutil.copy(path, folder)) for path in backbone_files["resnet"]]
    backbone = BackboneConfig(name="small", config=str(files[0]), path=str(files[1]))
    head = Predictor("zero_shot", {"text_features": unit(9, 5)}, {}, 11.5, NAMES)
    candidate = Candidate(
        predictor=head,
        backbone=backbone,
        method="ebm",
        score="delta_energy",
        params=PARAMS,
        threshold=THRESHOLD,
        target_tpr=0.95,
        class_names=NAMES,
        facts={"benchmark": "digits"},
    )
    tracker = mlflow_store.tracker
    with tracker.run("main") as active:
        pass
    done = [register(candidate, tracker, active.run_id) for _ in range(2)]
    loaded = network.load(backbone)
    pixels = [loaded.preprocess(Image.open(io.BytesIO(png(seed)))) for seed in range(3)]
    features = np.concatenate([loaded.encode_image(p[None]).numpy() for p in pixels])
    for file in files:
        file.unlink()
    return Registered(candidate, active.run_id, done, features)


def test_a_restart_finds_its_version(mlflow_store, registered):
    client = mlflow_store.tracker.client
    first, second = registered.results
    assert first == second
    found = client.search_model_versions("name = 'energy-ood'")
    assert first == RegisterResult(
        name="energy-ood", model_version="1", uri="models:/energy-ood@champion", method="ebm",
        score="delta_energy", params=PARAMS, threshold=THRESHOLD,
        content=found[0].tags["content"],
    )  # fmt: skip
    assert RegisterResult.from_json(first.to_json(), "register.json") == first
    assert [version.version for version in found] == [1]
    assert found[0].run_id == registered.run_id
    tags = found[0].tags
    assert (tags["method"], tags["score"], tags["benchmark"]) == ("ebm", "delta_energy", "digits")
    assert float(tags["threshold"]) == 1.25
    assert (tags["threshold_low"], tags["threshold_high"]) == ("1", "1.5")
    assert (tags["threshold_images"], tags["threshold_rule"]) == ("400", "conformal")
    assert float(tags["target_tpr"]) == 0.95
    assert {key: float(tags[f"score.{key}"]) for key in PARAMS} == PARAMS


def test_another_content_is_another_version_and_the_alias_follows(
    mlflow_store, backbone_files, registered
):
    tracker, settings = mlflow_store.tracker, RegisterConfig(name="other", alias="best")
    config, weights = backbone_files["resnet"]
    first = replace(
        registered.candidate,
        backbone=BackboneConfig(name="small", config=str(config), path=str(weights)),
    )
    second = replace(first, threshold=THRESHOLD.model_copy(update={"value": 1.5}))
    versions, aliased = [], []
    for candidate in (first, second, first, replace(first, facts={"benchmark": "renamed"})):
        done = register(candidate, tracker, registered.run_id, settings=settings)
        versions.append(done.model_version)
        aliased.append(str(tracker.client.get_model_version_by_alias("other", "best").version))
        assert done.uri == "models:/other@best"
    assert versions == aliased == ["1", "2", "1", "1"]
    client = tracker.client
    assert str(client.get_model_version_by_alias("energy-ood", "champion").version) == "1"


def test_a_registration_that_was_cut_short_leaves_one_version(
    mlflow_store, backbone_files, registered, monkeypatch
):
    import pipelines.register.stage

    config, weights = backbone_files["resnet"]
    backbone = BackboneConfig(name="small", config=str(config), path=str(weights))
    candidate = replace(registered.candidate, backbone=backbone)
    client, settings = mlflow_store.tracker.client, RegisterConfig(name="cut short")

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.register.stage, "_ensure_name", cut)  # the model is logged by then
        with pytest.raises(KeyboardInterrupt):
            register(candidate, mlflow_store.tracker, registered.run_id, settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr(type(client), "set_registered_model_alias", cut)  # the version is there
        with pytest.raises(KeyboardInterrupt):
            register(candidate, mlflow_store.tracker, registered.run_id, settings=settings)
    done = register(candidate, mlflow_store.tracker, registered.run_id, settings=settings)
    found = client.search_model_versions("name = 'cut short'")
    assert [str(version.version) for version in found] == [done.model_version] == ["1"]
    assert str(client.get_model_version_by_alias("cut short", "champion").version) == "1"


FRESH = """
import io, json, sys
import mlflow, numpy as np, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/energy-ood@champion")
work = sys.argv[2]
features = np.load(f"{work}/features.npy")
images = json.load(open(f"{work}/images.json"))
frames = {
    "arrays": pd.DataFrame({"feature": list(features)}),
    "lists": pd.DataFrame({"feature": features[::-1].tolist()}),
    "images": pd.DataFrame({"image": [bytes.fromhex(image) for image in images]}),
}
for name, frame in frames.items():
    answer = model.predict(frame)
    answer.to_parquet(f"{work}/{name}.parquet")
refusals = []
for bad in ({"image": [b"x"], "feature": [[1.0]]}, {"feature": [[1.0], [1.0, 0.0]]}):
    try:
        model.predict(pd.DataFrame(bad))
    except Exception as error:
        refusals.append(str(error))
import pipelines
json.dump({"code": pipelines.__file__, "refusals": refusals}, open(f"{work}/facts.json", "w"))
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_scores_bit_for_bit(mlflow_store, registered, tmp_path):
    import pandas as pd

    features = unit(4, 300)
    np.save(tmp_path / "features.npy", features)
    images = [png(0), b"rubbish", png(1), png(2)]
    (tmp_path / "images.json").write_text(json.dumps([image.hex() for image in images]))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_RUN_ID")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, mlflow_store.tracker.uri, str(tmp_path)],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["code"].startswith(f"{mlflow_store.storage.root}/artifacts/")
    assert "give one of the columns image" in facts["refusals"][0]
    assert "different lengths" in facts["refusals"][1]

    here = judge(registered.candidate.predictor, {"delta_energy": PARAMS}, features)
    for name, order in (("arrays", slice(None)), ("lists", slice(None, None, -1))):
        there = pd.read_parquet(tmp_path / f"{name}.parquet").iloc[order]
        assert there["score"].tolist() == here["score_delta_energy"].tolist()
        assert there["confidence"].tolist() == here["confidence"].tolist()
        assert there["class_name"].tolist() == [NAMES[k] for k in here["predicted"]]
        assert there["is_ood"].tolist() == (here["score_delta_energy"] < 1.25).tolist()
        assert there["error"].isna().all()

    answer = pd.read_parquet(tmp_path / "images.parquet")
    wanted = judge(
        registered.candidate.predictor, {"delta_energy": PARAMS}, registered.image_features
    )["score_delta_energy"]
    good = answer.iloc[[0, 2, 3]]
    np.testing.assert_allclose(good["score"], wanted, rtol=0, atol=1e-5)
    assert good["is_ood"].tolist() == (wanted < 1.25).tolist()
    assert answer["error"][1].startswith("not_an_image")
    assert answer["threshold"].tolist() == [1.25] * 4
    assert answer["is_ood"].isna().tolist() == [False, True, False, False]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in {
        "b/2.png": png(2),
        "a.png": png(0),
        "bad.png": b"",
        "t.txt": b"x",
    }.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
    return tmp_path / "images"


def test_predict_judges_a_folder_and_a_file(mlflow_store, registered, folder):
    config = PredictConfig(source=str(folder), storage=mlflow_store.storage.root, batch_size=2)
    found = {prediction.path: prediction for prediction in run(config)}
    names = ["a.png", "b/2.png", "bad.png"]
    assert list(found) == [str(folder / name) for name in names]
    wanted = judge(
        registered.candidate.predictor, {"delta_energy": PARAMS}, registered.image_features
    )["score_delta_energy"]
    scores = [found[str(folder / name)].score for name in names]
    assert scores == [
        pytest.approx(wanted[0], abs=1e-5),
        pytest.approx(wanted[2], abs=1e-5),
        None,
    ]
    bad = found[str(folder / "bad.png")]
    assert (bad.is_ood, bad.error) == (None, "empty: no bytes")
    (single,) = run(config.model_copy(update={"source": str(folder / "b" / "2.png")}))
    assert single.score == pytest.approx(wanted[2], abs=1e-5)
    assert single.is_ood == (wanted[2] < 1.25)
    assert single.threshold == 1.25


def test_the_library_loads_a_version_or_a_folder(mlflow_store, registered, tmp_path):
    by_version = load_detector("models:/energy-ood/1", mlflow_store.storage)
    by_version.save(tmp_path)
    detector = load_detector(str(tmp_path), Storage.open(str(tmp_path)))
    features = unit(6, 20)
    assert detector.judge_features(features).equals(by_version.judge_features(features))
    assert by_version.facts["method"] == "ebm"
    assert isinstance(detector, Detector)


def test_predict_says_what_is_missing(mlflow_store, folder, tmp_path):
    storage = mlflow_store.storage.root
    (tmp_path / "empty").mkdir()

    def message(**words: str) -> str:
        with pytest.raises(UserError) as error:
            run(PredictConfig(**{"storage": storage, "source": str(folder), **words}))
        (line,) = str(error.value).splitlines()
        return line

    with pytest.raises(UserError, match="give an image or a folder"):
        run(PredictConfig(storage=storage))
    assert "no such" in message(source=str(tmp_path / "nowhere"))
    assert "no image here" in message(source=str(tmp_path / "empty"))
    unused = tmp_path / "unused"
    text = message(storage=str(unused))
    assert "run python -m jobs.pipeline first" in text
    assert not unused.exists()
    for model in ("models:/never-seen@champion", "models:/energy-ood@nobody"):
        text = message(model=model)
        assert text.startswith(f"{model}: no such model")
        assert "run python -m jobs.pipeline first" in text
    assert "no detector there" in message(model=str(tmp_path))
