"""The frozen predictor: batch-invariant, and the same after saving."""

import numpy as np
import pytest
import torch

from pipelines.config import UserError
from pipelines.heads import HeadContext, Predictor, build
from pipelines.heads.zero_shot import Config as ZeroShotConfig
from tests.small_clip import CLASS_NAMES, small_clip


def unit(count, dim=16, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def zero_shot(templates=("a photo of a {}.", "{}")):
    clip = small_clip()
    context = HeadContext(
        clip, CLASS_NAMES, templates, torch.zeros(4, clip.embed_dim), torch.arange(4)
    )
    return clip, build(ZeroShotConfig(), context, seed=0)


def test_a_rows_similarity_does_not_depend_on_its_batch():
    predictor = zero_shot()[1].predictor()
    features = unit(700)
    whole = predictor.similarity(features)
    for start, stop in ((0, 1), (3, 4), (255, 257), (500, 700), (699, 700)):
        assert np.array_equal(predictor.similarity(features[start:stop]), whole[start:stop])


def test_similarity_is_the_cosine_rounded_once():
    predictor = zero_shot()[1].predictor()
    features, text = unit(20), predictor.arrays["text_features"]
    for row in range(20):
        for column in range(len(CLASS_NAMES)):
            terms = [float(a) * float(b) for a, b in zip(features[row], text[column], strict=True)]
            cosine = predictor.similarity(features)[row, column]
            assert cosine == pytest.approx(sum(terms), rel=1e-7, abs=1e-9)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    predictor = zero_shot()[1].predictor()
    predictor.save(tmp_path / "head")
    loaded = Predictor.load(tmp_path / "head")
    features = unit(40)
    assert np.array_equal(loaded.similarity(features), predictor.similarity(features))
    assert loaded.class_names == CLASS_NAMES
    assert loaded.logit_scale == predictor.logit_scale == 10.0
    assert loaded.files() == predictor.files()


def test_no_rows_give_no_rows():
    assert zero_shot()[1].predictor().similarity(unit(0)).shape == (0, len(CLASS_NAMES))


def test_templates_are_averaged_as_unit_features_and_normalised_again():
    clip, head = zero_shot()
    for number, name in enumerate(CLASS_NAMES):
        tokens = clip.tokenizer([f"a photo of a {name}.", name])
        parts = [clip.model.encode_text(t[None])[0].double() for t in tokens]
        mean = sum(part / part.norm() for part in parts) / 2
        expected = (mean / mean.norm()).float()
        assert torch.allclose(head.text_features()[number], expected, atol=1e-6)


def test_a_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(UserError, match="a photo"):
        zero_shot(templates=("a photo",))
