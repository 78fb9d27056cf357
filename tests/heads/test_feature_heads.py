"""Heads on image features: by hand in plain Python, and predictors that agree with training."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.config import UserError
from pipelines.heads import HEADS, HeadContext, Predictor, build
from tests.small_clip import CLASS_NAMES, small_backbone, toy_data

TEMPLATES = ("a photo of a {}.",)


def context_of(clip, data):
    columns = {name: torch.tensor(column) for name, column in data.columns.items()}
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    return HeadContext(clip, CLASS_NAMES, TEMPLATES, features, labels, columns)


def built(name, **settings):
    config, data = HEADS[name].Config(**settings), toy_data(per_class=3)
    backbone = small_backbone(config)
    head = build(config, context_of(backbone, data), seed=0)
    return backbone, data, head


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def zero_shot_text(clip):
    return clip.encode_text([f"a photo of a {name}." for name in CLASS_NAMES]).tolist()


@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_predictor_agrees_with_its_head_and_survives_saving(name, tmp_path):
    settings = {"num_context": 4} if "num_context" in HEADS[name].Config.model_fields else {}
    _, data, head = built(name, **settings)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
        given = [data.validation_features]
        if "local_features" in HEADS[name].Config.columns:
            given.append(data.validation_columns["local_features"])
        expected = head(*(torch.tensor(rows) for rows in given)).numpy()
    predictor = head.predictor()
    found = predictor.similarity(*given)
    assert np.abs(found - expected).max() < 2e-6
    predictor.save(tmp_path)
    loaded = Predictor.load(tmp_path)
    assert np.array_equal(loaded.similarity(*given), found)
    rows = range(len(data.validation_features))
    single = np.concatenate([loaded.similarity(*(g[n : n + 1] for g in given)) for n in rows])
    assert np.array_equal(single, found)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_what_a_head_says_of_itself_is_so(name):
    config = HEADS[name].Config
    settings = {"num_context": 4} if "num_context" in HEADS[name].Config.model_fields else {}
    clip, _, head = built(name, **settings)
    assert bool(list(head.parameters())) == config.trainable
    assert head.logit_scale == clip.logit_scale
    if config.has_text_features:
        norms = head.text_features().detach().norm(dim=1)
        assert torch.allclose(norms, torch.ones(len(CLASS_NAMES)), atol=1e-6)
    else:
        with pytest.raises(UserError, match=name):
            head.text_features()


def test_a_linear_probe_starts_at_zero_or_at_zero_shot():
    clip, data, head = built("linear_probe")
    assert not head(torch.tensor(data.features)).any()
    _, _, warm = built("linear_probe", init="text")
    expected = dot(data.features[5], zero_shot_text(clip)[2])
    assert float(warm(torch.tensor(data.features)).detach()[5, 2]) == pytest.approx(
        expected, abs=1e-6
    )


def test_clip_adapter_by_hand():
    clip, data, head = built("clip_adapter", reduction=4, ratio=0.2)
    down, up = head.down.tolist(), head.up.tolist()
    assert len(down) == 4
    assert len(up) == 16
    z = data.features[7].tolist()
    hidden = [max(0.0, dot(row, z)) for row in down]
    adapted = [max(0.0, dot(row, hidden)) for row in up]
    mixed = [0.2 * a + 0.8 * b for a, b in zip(adapted, z, strict=True)]
    norm = math.sqrt(dot(mixed, mixed))
    expected = [dot(mixed, text) / norm for text in zero_shot_text(clip)]
    found = head(torch.tensor(data.features))[7].tolist()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["tip_adapter", "tip_adapter_f"])
def test_tip_adapter_by_hand(name):
    clip, data, head = built(name, alpha=1.17, beta=5.5)
    z = data.validation_features[3].tolist()
    logits = [clip.logit_scale * dot(z, text) for text in zero_shot_text(clip)]
    for key, label in zip(data.features, data.labels, strict=True):
        logits[label] += 1.17 * math.exp(-5.5 * (1 - dot(z, key)))
    found = head(torch.tensor(data.validation_features))[3] * head.logit_scale
    assert found.tolist() == pytest.approx(logits, abs=1e-5)


def test_zero_shot_takes_templates_of_its_own():
    clip, data, own = built("zero_shot", templates=["a {}.", "the {} here"])
    means = [
        clip.encode_text([f"a {name}.", f"the {name} here"]).double().mean(dim=0)
        for name in CLASS_NAMES
    ]
    expected = [float(data.features[5] @ (m / m.norm()).numpy()) for m in means]
    similarity = own.predictor().similarity(data.features[5:6])[0]
    assert similarity == pytest.approx(expected, abs=1e-6)
    for wrong in ([], ["a photo"]):
        with pytest.raises(ValidationError, match=r"needs \{\} where the class name goes"):
            HEADS["zero_shot"].Config(templates=wrong)
