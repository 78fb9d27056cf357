"""Logits adjusted for a long-tailed training set: the predicted class, and nothing else."""

import dataclasses
import math

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.config import UserError
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import Predictor
from pipelines.methods import METHODS
from pipelines.register.detector import Detector
from pipelines.score.judge import judge
from tests.small_clip import small_clip, toy_data

SCORES = {"energy": {"tau": 1.0}, "mcm": {"tau": 1.0}, "delta_energy": {}}


def long_tailed():
    """The toy with 24, 12, 6 and 3 images a class."""
    data = toy_data()
    kept = np.concatenate([np.flatnonzero(data.labels == k)[: 24 >> k] for k in range(4)])
    return dataclasses.replace(
        data, features=data.features[kept], labels=data.labels[kept], address="long tail"
    )


def trained(strength, name="coop"):
    config = METHODS[name].Config(
        head={"name": "linear_probe"} if name == "coop" else {"name": "coop", "num_context": 2},
        adjust_logits=strength,
        training={"epochs": 3, "batch_size": 16, "lr": 0.05},
    )
    return train_in_process(TrainingJob(config, 0), long_tailed(), small_clip())


def test_the_predicted_class_is_that_of_the_adjusted_logits():
    plain, adjusted = trained(0.0).last, trained(1.0).last
    features = toy_data().validation_features
    assert np.array_equal(plain.arrays["weight"], adjusted.arrays["weight"])
    similarity = plain.similarity(features)
    assert np.array_equal(adjusted.similarity(features), similarity)
    expected = []
    for row in similarity.tolist():
        values = [10.0 * s - math.log((24 >> k) / 45) for k, s in enumerate(row)]
        expected.append(values.index(max(values)))
    assert adjusted.predicted(similarity).tolist() == expected
    assert plain.predicted(similarity).tolist() == similarity.argmax(axis=1).tolist()
    assert (adjusted.predicted(similarity) != plain.predicted(similarity)).any()
    # The rare classes gain, as they should.
    assert np.mean(adjusted.predicted(similarity)) > np.mean(plain.predicted(similarity))


def test_scores_are_those_of_the_unadjusted_logits():
    features = toy_data().validation_features
    plain = judge(trained(0.0).last, SCORES, features)
    adjusted = judge(trained(1.0).last, SCORES, features)
    for name in SCORES:
        assert np.array_equal(plain[f"score_{name}"], adjusted[f"score_{name}"])
    assert (plain["predicted"] != adjusted["predicted"]).any()
    # The confidence is that of the class which is named.
    same = plain["predicted"] == adjusted["predicted"]
    assert (plain["confidence"][same] != adjusted["confidence"][same]).any()
    assert ((adjusted["confidence"] > 0.25) & (adjusted["confidence"] <= 1)).all()


def test_saved_and_registered_models_adjust_too(tmp_path):
    predictor, features = trained(1.5).predictor, toy_data().validation_features
    predictor.save(tmp_path / "head")
    loaded = Predictor.load(tmp_path / "head")
    assert loaded.class_prior == pytest.approx([24 / 45, 12 / 45, 6 / 45, 3 / 45])
    assert loaded.adjustment == 1.5
    # What the registry holds is a saved detector.
    (tmp_path / "detector").mkdir()
    Detector(predictor, None, "energy", {"tau": 1.0}, threshold=0.0).save(tmp_path / "detector")
    verdicts = Detector.load(tmp_path / "detector").judge_features(features)
    expected = judge(predictor, {"energy": {"tau": 1.0}}, features)
    names = [predictor.class_names[k] for k in expected["predicted"]]
    assert verdicts["class_name"].to_pylist() == names
    assert verdicts["score"].to_pylist() == expected["score_energy"].tolist()
    assert (expected["predicted"] != predictor.similarity(features).argmax(axis=1)).any()


@pytest.mark.parametrize("name", ["coop", "ebm"])
def test_validation_accuracy_is_that_of_the_class_which_is_named(name):
    data, result = long_tailed(), trained(1.0, name)
    predicted = result.last.predicted(result.last.similarity(data.validation_features))
    share = float((predicted == data.validation_labels).mean())
    assert result.history[-1]["validation/accuracy"] == pytest.approx(share, abs=1e-6)


def test_it_is_refused_where_nothing_has_learned_the_shares():
    with pytest.raises(ValidationError, match=r"adjust_logits=1\.0: zero-shot prompts"):
        METHODS["zero_shot"].Config(adjust_logits=1.0)
    config = METHODS["cross_entropy"].Config(head="tip_adapter", adjust_logits=1.0)
    data = long_tailed()
    kept = data.labels != 1
    data = dataclasses.replace(data, features=data.features[kept], labels=data.labels[kept])
    with pytest.raises(UserError, match="no training image of: one dog"):
        train_in_process(TrainingJob(config, 0), data, small_clip())
