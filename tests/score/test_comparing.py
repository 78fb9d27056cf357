"""gl_mcm and neg_label, from stored features and words to scores, against loops over floats."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipelines.backbones import network
from pipelines.backbones import network as backbones
from pipelines.backbones.description import BackboneConfig
from pipelines.config import ConfigError, UserError, load
from pipelines.data.benchmarks import Benchmark, Selection
from pipelines.data.feature_sets import FeatureSets
from pipelines.data.storage import Storage
from pipelines.finetune.cache import keep
from pipelines.finetune.loop import Trained, TrainingJob
from pipelines.heads import Predictor
from pipelines.methods import METHODS
from pipelines.ood.negatives import NegativeLabels, mine_negatives
from pipelines.records import HeadKey
from pipelines.register.detector import Detector
from pipelines.run import Run
from pipelines.score import by_name as scoring
from pipelines.score import comparing_search
from pipelines.score import stage as score
from pipelines.score.cache import FittedManifest, write
from pipelines.score.config import PostHocConfig
from pipelines.score.judge import judge
from pipelines.score.result import HeadScores
from pipelines.settings.config import PipelineConfig, with_local_features
from pipelines.sweep.spec import MakeSpec, inputs_digest
from pipelines.sweep.trial import Shared
from tests.feature_cache import make_cache
from tests.small_clip import toy_data

DIM, PLACES = 8, 3
GL = {"tau": 0.3, "weight": 0.7}


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def predictor(head: str = "zero_shot") -> Predictor:
    rng = np.random.default_rng(4)
    arrays = {"text_features": unit(rng, 4, DIM)}
    settings: dict[str, object] = {}
    if head == "clip_adapter":
        arrays |= {"down": unit(rng, 2, DIM), "up": unit(rng, DIM, 2)}
        settings = {"ratio": 0.4}
    if head == "gallop":
        arrays |= {"local_text_features": unit(rng, 2, 4, DIM), "projection": unit(rng, DIM, DIM)}
        settings = {"scales": [0.3, 0.6]}
    return Predictor(head, arrays, settings, 10.0, ("p", "q", "r", "s"))


def images(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return unit(rng, rows, DIM), unit(rng, rows, PLACES, DIM)


def words() -> NegativeLabels:
    return NegativeLabels(torch.tensor(unit(np.random.default_rng(9), 5, DIM)))


def normal(row: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def adapted(head: Predictor, z: list[float]) -> list[float]:
    """What a head compares with text in place of z."""
    if head.head != "clip_adapter":
        return z
    down, up = (head.arrays[name].tolist() for name in ("down", "up"))
    hidden = [max(0.0, dot(w, z)) for w in down]
    more = [max(0.0, dot(w, hidden)) for w in up]
    return normal([0.4 * a + 0.6 * v for a, v in zip(more, z, strict=True)])


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def top_share(values: list[float], tau: float) -> float:
    return max(math.exp(v / tau) for v in values) / sum(math.exp(v / tau) for v in values)


def gl_mcm_by_hand(head: Predictor, z: list[float], places: list[list[float]]) -> float:
    text = head.arrays["text_features"].tolist()
    whole = top_share([dot(adapted(head, z), h) for h in text], GL["tau"])
    if head.head == "gallop":
        projection = head.arrays["projection"].tolist()
        places = [normal([dot(w, p) for w in projection]) for p in places]
        text = head.arrays["local_text_features"].astype(float).mean(axis=0).tolist()
    local = [[dot(adapted(head, p), h) for h in text] for p in places]
    return whole + GL["weight"] * max(top_share(row, GL["tau"]) for row in local)


def neg_label_by_hand(head: Predictor, z: list[float], tau: float) -> float:
    z = adapted(head, z)
    known = sum(math.exp(dot(z, h) / tau) for h in head.arrays["text_features"].tolist())
    others = sum(math.exp(dot(z, h) / tau) for h in words().text_features.tolist())
    return known / (known + others)


def neg_mcm_by_hand(head: Predictor, z: list[float], tau: float) -> float:
    z = adapted(head, z)
    known = [math.exp(dot(z, h) / tau) for h in head.arrays["text_features"].tolist()]
    others = sum(math.exp(dot(z, h) / tau) for h in words().text_features.tolist())
    return max(known) / (sum(known) + others)


CHOSEN = {"gl_mcm": GL, "neg_label": {"tau": 0.2}, "neg_mcm": {"tau": 0.4}, "mcm": {"tau": 0.3}}


@pytest.mark.parametrize("head", ["zero_shot", "coop", "clip_adapter", "gallop"])
def test_scores_are_the_formulas_whatever_the_head(head: str) -> None:
    known, (features, local) = predictor(head), images(20)
    judged = judge(known, CHOSEN, features, {"neg_label": words()}, local)
    for row in range(20):
        expected = gl_mcm_by_hand(known, features[row].tolist(), local[row].tolist())
        assert judged["score_gl_mcm"][row] == pytest.approx(expected, abs=2e-7)
        expected = neg_label_by_hand(known, features[row].tolist(), 0.2)
        assert judged["score_neg_label"][row] == pytest.approx(expected, rel=2e-6)
        expected = neg_mcm_by_hand(known, features[row].tolist(), 0.4)
        assert judged["score_neg_mcm"][row] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("head", ["zero_shot", "clip_adapter", "gallop"])
def test_a_row_has_the_same_bits_in_any_batch(head: str) -> None:
    known, (features, local) = predictor(head), images(600)
    records = {"neg_label": words()}
    whole = judge(known, CHOSEN, features, records, local)
    order = np.random.default_rng(1).permutation(600)
    shuffled = judge(known, CHOSEN, features[order], records, local[order])
    ones = [
        judge(known, CHOSEN, features[i : i + 1], records, local[i : i + 1])
        for i in range(0, 600, 41)
    ]
    for column, values in whole.items():
        np.testing.assert_array_equal(shuffled[column], values[order], column)
        np.testing.assert_array_equal(np.concatenate([j[column] for j in ones]), values[::41])


def test_missing_local_features_are_a_users_error() -> None:
    features, _ = images(3)
    with pytest.raises(UserError, match=r"gl_mcm reads local features.*embed\.local_features"):
        judge(predictor(), {"gl_mcm": GL}, features)
    with pytest.raises(UserError, match="head gallop predicts from local features too"):
        judge(predictor("gallop"), {"mcm": {}}, features)


def test_heads_without_cosines_are_left_out() -> None:
    for name, head in {"coop": True, "negprompt": True, "linear_probe": False}.items():
        assert scoring.applies("gl_mcm", name) is head
        assert scoring.applies("neg_label", name) is head
        assert scoring.applies("neg_mcm", name) is head
        assert scoring.applies("mcm", name)


@pytest.mark.parametrize("head", ["zero_shot", "gallop"])
def test_the_search_judges_every_setting_as_by_hand(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing_search, "BLOCK_ROWS", 7)  # several blocks
    sets, known = opened(tmp_path), predictor(head)
    loaded = [sets.load(name) for name in ("validation", "validation_ood/x")]
    local = {s.name: sets.column(s.name, "local_features") for s in loaded}
    config = PostHocConfig(budget=6, tau=(0.1, 1.0), weight=[0.5, 2.0])
    records = {"neg_label": words()}
    found = comparing_search.search(
        ["gl_mcm", "neg_label", "neg_mcm", "mcm"], known, loaded, local, records, config
    )
    assert list(found) == ["gl_mcm", "neg_label", "neg_mcm"]
    assert [len(tried) for tried in found.values()] == [6, 6, 6]
    assert {s.params["weight"] for s in found["gl_mcm"]} == {0.5, 2.0}
    assert {s.params["tau"] for s in found["neg_label"]} >= {0.05, 0.5}
    assert {s.params["tau"] for s in found["neg_mcm"]} >= {0.1, 1.0}
    for name, tried in found.items():
        for setting in tried:
            parts = [
                judge(known, {name: setting.params}, s.features, records, local[s.name])
                for s in loaded
            ]
            scores = [part[f"score_{name}"] for part in parts]
            truth = [1] * len(scores[0]) + [0] * len(scores[1])
            assert setting.auroc == pytest.approx(roc_auc_score(truth, np.concatenate(scores)))


def opened(folder: Path, *, local: bool = True) -> FeatureSets:
    """Twenty images each of validation, validation_ood/x and test, one source."""
    features, of_places = images(60)
    keys = [f"{n:02d}" for n in range(60)]
    rows = dict(zip(keys, features, strict=True))
    more = dict(zip(keys, of_places, strict=True)) if local else None
    cache = make_cache(Storage(str(folder)), "all", rows, local=more)
    names = ("validation", "validation_ood/x", "test")
    chosen = {
        name: Selection(("all",) * 20, tuple(keys[start : start + 20]), (0,) * 20)
        for name, start in zip(names, (0, 20, 40), strict=True)
    }
    benchmark = Benchmark("toy", ("p", "q", "r", "s"), ("{}",), "", {}, chosen, "address")
    return FeatureSets(benchmark, {"all": cache})


def stored(folder: Path, head: str) -> tuple[Storage, Predictor]:
    """A head in the cache under the address `head`, and neg_label's words under `words`."""
    storage, known = Storage(str(folder)), predictor(head)
    trained = Trained(known, known, 0, ())
    keep(head, TrainingJob(METHODS["zero_shot"].Config(), 0), toy_data(), trained, storage)
    write(storage, "words", words(), FittedManifest(score="neg_label"))
    return storage, known


@pytest.mark.parametrize("head", ["zero_shot", "gallop"])
def test_the_score_stage_reads_the_local_features_of_its_images(head: str, tmp_path: Path) -> None:
    sets = opened(tmp_path)
    storage, known = stored(tmp_path, head)

    key = HeadKey(method="m", seed=0)
    heads = [HeadScores(key=key, address=head, scores=CHOSEN, fitted={"neg_label": "words"})]
    result = score.run(heads, sets, storage, with_ray=False)
    table = score.read_all(storage, result)[key].to_pydict()
    features, local = images(60)
    expected = judge(known, CHOSEN, features, {"neg_label": words()}, local)
    place = [int(key) for key in table["key"]]
    assert sorted(place) == list(range(60))
    for column in expected:
        np.testing.assert_array_equal(table[column], expected[column][place])


def test_a_trial_searches_them_and_its_address_knows_the_words(tmp_path: Path) -> None:
    sets, data = opened(tmp_path), toy_data()
    assert comparing_search.local_features(sets, ["validation"], {}, ["mcm"]) == {}
    with pytest.raises(UserError, match="no local_features"):
        comparing_search.local_features(
            opened(tmp_path / "b", local=False), ["validation"], {}, ["gl_mcm"]
        )
    shared = Shared(
        data=data,
        validation=sets.load("validation"),
        ood={"validation_ood/x": sets.load("validation_ood/x")},
        judged_on="validation_ood",
        backbone=BackboneConfig(name="tiny"),
        storage=Storage(str(tmp_path)),
        scores=("gl_mcm", "neg_label"),
        posthoc=PostHocConfig(),
        records={"neg_label": words()},
    )
    other = replace(shared, records={"neg_label": NegativeLabels(-words().text_features)})
    assert address_of(shared, sets) != address_of(other, sets)


def address_of(shared: Shared, sets: FeatureSets) -> str:
    # The tiny backbone has no files: its identity is not what is tested.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "identity", lambda _: {})
        inputs = inputs_digest(shared, sets)
    make = MakeSpec("zero_shot", METHODS["zero_shot"].Config(), shared.scores, inputs)
    return make({}).address


class TestWords:
    def test_mined_words_are_the_farthest_by_percentile(self) -> None:
        rng = np.random.default_rng(2)
        candidates, classes = unit(rng, 40, DIM), unit(rng, 5, DIM)
        distances = []
        for word in candidates.tolist():
            minus = sorted(-dot(word, h) for h in classes.tolist())
            place = 0.3 * (len(minus) - 1)
            low = math.floor(place)
            distances.append(minus[low] + (place - low) * (minus[low + 1] - minus[low]))
        expected = sorted(range(40), key=lambda n: -distances[n])[:10]
        found = mine_negatives(candidates, classes, share=0.25, percentile=0.3)
        assert found.tolist() == expected
        assert len(mine_negatives(candidates[:3], classes)) == 1
        with pytest.raises(ValueError, match="0 < share <= 1"):
            mine_negatives(candidates, classes, share=0.0)
        with pytest.raises(ValueError, match="rows of one size"):
            mine_negatives(candidates, classes[:, :2])


class TestRun:
    def config(self, *given: str) -> PipelineConfig:
        return load(PipelineConfig, "pipeline", ["sweep=none", *given])

    def test_all_scores_has_gl_mcm_where_a_method_reads_local_features(self) -> None:
        plain, local = self.config("scores=all"), self.config("methods=all", "scores=all")
        assert "neg_label" in plain.scores
        assert "gl_mcm" not in plain.scores
        densities = {"energy_correction", "feature_ebm", "gaussian_mixture"}
        assert set(local.scores) == {*plain.scores, "gl_mcm", *densities}

    @pytest.mark.parametrize("given", ["nouns", "words.txt", "/some/folder"])
    def test_a_list_of_words_is_no_group_of_the_configuration(self, given: str) -> None:
        assert self.config(f"negative_classes={given}").negative_classes == given

    def test_all_scores_has_the_methods_own(self) -> None:
        found = self.config("methods=[coop,gaussian_mixture]", "scores=all")
        assert found.scores == [
            *self.config("methods=[coop]", "scores=all").scores,
            "gaussian_mixture",
        ]
        other = self.config(
            "methods=[coop]", "methods.coop.score=energy+knn", "scores=all", "backbone=mini"
        )
        assert other.scores[-1] == "energy+knn"

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (("methods=[coop]", "scores=[mcm]"), False),
            (("methods=[coop]", "scores=[gl_mcm]"), True),
            (("methods=[locoop]", "scores=[mcm]"), True),
            (("methods=[gallop]", "scores=[mcm]"), True),
        ],
    )
    def test_local_features_are_embedded_where_they_are_read(
        self, given: tuple[str, ...], expected: bool
    ) -> None:
        found = with_local_features(self.config(*given))
        assert found.embed.local_features is expected

    def test_a_score_that_applies_to_no_head_is_refused_at_once(self, tmp_path: Path) -> None:
        from pipelines.run.observer import Quiet

        config = self.config("methods=[linear_probe]", "scores=[gl_mcm,mcm]", f"storage={tmp_path}")
        with pytest.raises(ConfigError, match="scores: gl_mcm applies to no method of this run"):
            Run.open(config, Quiet())


def picture(seed: int, size: int) -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("tower", "size"), [("vit", 32), ("resnet", 64)])
@pytest.mark.parametrize("head", ["zero_shot", "gallop"])
def test_a_detector_judges_images_by_their_local_features(
    tower: str, size: int, head: str, tmp_path: Path, backbone_files: dict[str, tuple[Path, Path]]
) -> None:
    config, path = backbone_files[tower]
    backbone = BackboneConfig(name="tiny", config=str(config), path=str(path))
    loaded = network.load(backbone)
    rng, dim = np.random.default_rng(4), loaded.embed_dim
    arrays = {"text_features": unit(rng, 4, dim)}
    settings: dict[str, object] = {}
    if head == "gallop":
        arrays |= {"local_text_features": unit(rng, 2, 4, dim), "projection": unit(rng, dim, dim)}
        settings = {"scales": [0.3, 0.6]}
    known = Predictor(head, arrays, settings, 10.0, ("p", "q", "r", "s"))
    contents = [picture(seed, size) for seed in range(3)]
    detector = Detector(known, backbone, "gl_mcm", GL, 0.5, batch_size=3)
    detector.save(tmp_path)
    verdicts = Detector.load(tmp_path).judge_images(contents).to_pylist()
    pixels = [np.asarray(loaded.crop(Image.open(io.BytesIO(c)).convert("RGB"))) for c in contents]
    features, local = loaded.encode_with_local(loaded.normalize(torch.tensor(np.stack(pixels))))
    assert local.shape[:2] == (3, loaded.num_local)
    for row, verdict in enumerate(verdicts):
        expected = gl_mcm_by_hand(known, features[row].tolist(), local[row].tolist())
        assert verdict["score"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match="local features"):
        detector.judge_features(features.numpy())


def test_a_registered_model_that_reads_local_features_asks_for_images() -> None:
    import pandas as pd

    from pipelines.store.tracker import load_mlflow

    load_mlflow()  # without the warnings that importing it gives
    from pipelines.register.mlflow_model import RegisteredModel

    model = RegisteredModel()
    model.detector = Detector(predictor(), None, "gl_mcm", GL, 0.5)
    frame = pd.DataFrame({"feature": [[1.0] + [0.0] * (DIM - 1)]})
    with pytest.raises(ValueError, match="local features of each image too: give the column image"):
        model.predict(None, frame)
    model.detector = Detector(predictor(), None, "mcm", {}, 0.5)
    assert len(model.predict(None, frame)) == 1
