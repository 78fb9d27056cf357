"""NegPrompt's published objective: positive prompts first, then negative ones beside them."""

import io

import numpy as np
import pytest
import torch

from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.methods import METHODS
from tests.small_clip import small_clip, toy_data

EPOCHS = 3
PROMPT = {"num_context": 2}
TRAINING = {"epochs": EPOCHS, "batch_size": 40, "lr": 0.1, "warmup_epochs": 1}
NEGATIVES = [f"negatives.{number}.context" for number in range(2)]


class Kept:
    """Every state that was saved; a run begins at the one it is given."""

    def __init__(self, first=None):
        self.first, self.states = first, []

    def load(self):
        return self.first

    def save(self, content):
        self.states.append(content)

    def parameters(self, epoch):
        state = torch.load(io.BytesIO(self.states[epoch - 1]), weights_only=True)
        return {name: array.numpy() for name, array in state["parameters"].items()}


def train(kept=None, *, name="negprompt", **settings):
    if name == "negprompt":
        settings = {"objective": "published", **settings}
    head = {"name": "negprompt", "prompt": PROMPT} if name == "negprompt" else {}
    config = METHODS[name].Config(
        head=head or {"name": "coop", **PROMPT}, **{"training": TRAINING, **settings}
    )
    return train_in_process(TrainingJob(config, 3), toy_data(), small_clip(), checkpoint=kept)


def test_the_first_stage_is_coop_and_the_second_leaves_its_best_prompts():
    kept, coop = Kept(), train(name="coop")
    result = train(kept)
    assert result.history[:EPOCHS] == coop.history
    best = kept.parameters(coop.best_epoch)["positive.context"]
    for epoch in range(EPOCHS + 1, 2 * EPOCHS + 1):
        np.testing.assert_array_equal(kept.parameters(epoch)["positive.context"], best)
    expected = coop.predictor.arrays["text_features"]
    np.testing.assert_array_equal(result.predictor.arrays["text_features"], expected)
    # Validation sees the positive prompts alone, so that it cannot choose: the last epoch is kept.
    assert result.best_epoch == len(result.history) == 2 * EPOCHS
    assert result.predictor.files() == result.last.files()
    # Each stage has its own warm-up and cosine.
    rates = [report["lr"] for report in result.history]
    assert rates[:EPOCHS] == rates[EPOCHS:]


def test_negative_prompts_wait_and_then_begin_beside_the_positive_ones():
    kept = Kept()
    train(kept, training={**TRAINING, "lr": 1e-12, "warmup_lr": 1e-12})
    start, later = kept.parameters(1), kept.parameters(EPOCHS + 1)
    for name in NEGATIVES:
        np.testing.assert_array_equal(kept.parameters(EPOCHS)[name], start[name])
        away = np.abs(later[name] - later["positive.context"])
        assert 8e-6 < away.max() < 1.1e-5
        assert np.abs(later[name] - start[name]).max() > 1e-3
    assert np.abs(later[NEGATIVES[0]] - later[NEGATIVES[1]]).max() > 1e-6


def test_the_second_stage_teaches_negative_prompts():
    result = train(training={**TRAINING, "epochs": 10, "momentum": 0.0, "weight_decay": 0.0})
    first, *_, last = result.history[10:]
    taught = [sum(r[f"loss/{n}"] for n in ("images", "classes", "spread")) for r in (first, last)]
    assert taught[1] < taught[0] - 1e-3
    negatives = result.predictor.arrays["negative_text_features"].reshape(4, 2, 16)
    assert np.abs(negatives - result.predictor.arrays["text_features"][:, None]).max() > 1e-2


@pytest.mark.parametrize("epoch", range(1, 2 * EPOCHS))
def test_stopped_after_any_epoch_it_goes_on_to_the_same_bits(epoch):
    whole = Kept()
    expected = train(whole)
    found = train(Kept(whole.states[epoch - 1]))
    assert found.history == expected.history
    assert found.predictor.files() == expected.predictor.files()


def test_without_a_term_there_is_nothing_to_learn():
    off = {"image_weight": 0.0, "class_weight": 0.0, "spread_weight": 0.0}
    with pytest.raises(ValueError, match="nothing teaches the negative prompts"):
        train(**off)
