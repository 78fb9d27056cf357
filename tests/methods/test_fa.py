"""FA: what it reduces to, its update by hand, and what its (1 + c) K prompts say of an image.

The hand runs the tower in float64 on whole prompts, writes every copy of an original prompt out,
and takes its gradients by central differences.
"""

import io
import math

import numpy as np
import pytest
import torch

from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import HeadContext, Predictor, build
from pipelines.methods import METHODS
from pipelines.score import search as posthoc
from pipelines.score.by_name import inputs_of
from pipelines.score.config import PostHocConfig
from pipelines.score.judge import judge
from tests.methods.test_local_methods import (
    ONE_STEP,
    SHORT,
    Hand,
    bytes_of,
    dot,
    entropy_loss,
    train,
)
from tests.small_clip import small_clip, toy_data

RANDOM = {"num_context": 2}
HEAD = {"name": "fa", "prompt": RANDOM, "coefficient": 2}


class Kept:
    """Every state that was saved; a run begins at the one it is given."""

    def __init__(self, first=None):
        self.first, self.states = first, []

    def load(self):
        return self.first

    def save(self, content):
        self.states.append(content)

    def context(self):
        state = torch.load(io.BytesIO(self.states[-1]), weights_only=True)
        return state["parameters"]["forced.context"].double().numpy()


def test_with_coefficient_0_it_is_coop_to_the_bit():
    coop = train("coop", head={"name": "coop", **RANDOM})
    plain = train("fa", head={**HEAD, "coefficient": 0})
    assert plain.best_epoch == coop.best_epoch
    assert bytes_of(plain, "text_features") == bytes_of(coop, "text_features")
    features = toy_data().validation_features
    found, expected = (t.predictor.similarity(features) for t in (plain, coop))
    assert found.tobytes() == expected.tobytes()
    # And with it, it is not.
    forced = train("fa", head=HEAD)
    assert bytes_of(forced, "text_features") != bytes_of(coop, "text_features")


def objective(hand, context, original, data, copies):
    prompts = hand.text(context) + original * copies
    rows = [[10 * dot(z, h) for h in prompts] for z in data.features.tolist()]
    return entropy_loss(rows, data.labels)


@pytest.mark.parametrize("copies", [1, 3])
def test_one_update_is_the_one_by_hand(copies):
    data, clip, kept = toy_data(per_class=4), small_clip(), Kept()
    config = METHODS["fa"].Config(head={**HEAD, "coefficient": copies}, training=ONE_STEP)
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    context = HeadContext(clip, data.class_names, data.templates, features, labels)
    head = build(config.head, context, training_run.stream(0, "head"))
    start = head.forced.context.detach().double().numpy()
    result = train_in_process(TrainingJob(config, 0), data, clip, checkpoint=kept)
    hand = Hand(clip, data.class_names)
    # At first a forced prompt is its original one, and has 1 / (1 + c) of all.
    original = hand.text(start)
    expected = objective(hand, start, original, data, copies)
    assert result.history[0]["loss"] == pytest.approx(expected, rel=2e-5)
    assert result.history[0]["forced_share"] == pytest.approx(1 / (1 + copies), rel=1e-5)
    found = result.last.arrays["original_text_features"]
    np.testing.assert_allclose(found, np.array(original), atol=2e-6)
    random, moved = np.random.default_rng(0), kept.context() - start
    for place in [tuple(random.integers(size) for size in start.shape) for _ in range(6)]:
        ends = []
        for step in (1e-4, -1e-4):
            shifted = start.copy()
            shifted[place] += step
            ends.append(objective(hand, shifted, original, data, copies))
        gradient = (ends[0] - ends[1]) / 2e-4
        assert moved[place] == pytest.approx(-0.5 * gradient, rel=2e-3, abs=2e-6), place
    assert np.abs(moved).max() > 1e-3


def test_forced_prompts_gain_on_the_original_ones_which_stay():
    trained = train("fa", {**SHORT, "epochs": 10}, head=HEAD)
    shares = [report["forced_share"] for report in trained.history]
    assert shares[-1] > shares[0] + 0.02
    untrained = train("fa", {**SHORT, "lr": 1e-12, "warmup_lr": 1e-12}, head=HEAD)
    before = untrained.predictor.arrays
    np.testing.assert_allclose(
        before["text_features"], before["original_text_features"], rtol=0, atol=1e-6
    )
    assert bytes_of(trained, "original_text_features") == bytes_of(
        untrained, "original_text_features"
    )


@pytest.mark.parametrize("epoch", [1, 2])
def test_stopped_after_an_epoch_it_goes_on_to_the_same_bits(epoch):
    whole = Kept()
    expected = train_in_process(job(), toy_data(), small_clip(), checkpoint=whole)
    again = Kept(whole.states[epoch - 1])
    found = train_in_process(job(), toy_data(), small_clip(), checkpoint=again)
    assert found.history == expected.history
    assert found.predictor.files() == expected.predictor.files()


def job():
    return TrainingJob(METHODS["fa"].Config(head=HEAD, training=SHORT), 3)


def largest_share(cosines, tau):
    return max(math.exp(c / tau) for c in cosines) / sum(math.exp(c / tau) for c in cosines)


def known():
    """Forced and original prompts of three classes, and images that look like either."""
    random = np.random.default_rng(5)

    def unit(*shape):
        rows = random.normal(size=shape)
        return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)

    arrays = {"text_features": unit(3, 8), "original_text_features": unit(3, 8)}
    predictor = Predictor("fa", arrays, {"coefficient": 2}, 10.0, ("a", "b", "c"))
    return predictor, unit(40, 8), unit(40, 4, 8)


def test_scores_read_all_prompts_and_the_class_is_the_forced_ones(tmp_path):
    predictor, features, local = known()
    predictor.save(tmp_path)
    tau = {"mcm": {"tau": 0.3}, "gl_mcm": {"tau": 0.3, "weight": 0.7}}
    found = judge(Predictor.load(tmp_path), tau, features, local=local)
    texts = predictor.arrays["text_features"].tolist()
    originals = predictor.arrays["original_text_features"].tolist()
    prompts = texts + originals + originals
    nearest = []
    for row, (z, places) in enumerate(zip(features.tolist(), local.tolist(), strict=True)):
        cosines = [dot(z, h) for h in prompts]
        nearest.append(cosines.index(max(cosines)))
        logits = [10 * c for c in cosines[:3]]
        assert found["predicted"][row] == logits.index(max(logits))
        assert found["confidence"][row] == pytest.approx(largest_share(logits, 1.0), rel=1e-6)
        mcm = largest_share(cosines, 0.3)
        assert found["score_mcm"][row] == pytest.approx(mcm, rel=1e-6)
        best = max(largest_share([dot(p, h) for h in prompts], 0.3) for p in places)
        assert found["score_gl_mcm"][row] == pytest.approx(mcm + 0.7 * best, rel=1e-6)
    # Images whose nearest prompt is an original one are among them.
    assert min(nearest) < 3 <= max(nearest)
    # A sweep's search reads the same rows.
    similarity = predictor.similarity(features)
    assert similarity.shape == (40, 9)
    assert predictor.similarity(features[:0]).shape == (0, 9)
    same = posthoc.scores_of("mcm", similarity, 10.0, {"tau": 0.3})
    np.testing.assert_array_equal(same, found["score_mcm"])
    assert inputs_of(predictor, features).logits.shape == (40, 9)


def test_a_class_that_is_held_out_takes_all_its_prompts_with_it():
    predictor, features, _ = known()
    similarity = predictor.similarity(features)
    labels = predictor.predicted(similarity)
    config = PostHocConfig(budget=1, tau=(0.3, 1.0))  # 0.3 alone
    (found,) = posthoc.search_held_out_classes("mcm", similarity, labels, 10.0, config, 3)
    areas = []
    for left_out in range(3):
        kept = [c for c in range(9) if c % 3 != left_out]
        scores = [largest_share(row[kept].tolist(), 0.3) for row in similarity.astype(float)]
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, y in zip(scores, labels, strict=True)
            for b, other in zip(scores, labels, strict=True)
            if y != left_out and other == left_out
        ]
        areas.append(sum(pairs) / len(pairs))
    assert found.auroc == pytest.approx(sum(areas) / 3, abs=1e-9)
