"""The loop: deterministic, resumable, and it keeps the epoch that validation prefers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pipelines.config import UserError
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.finetune.together import train_together
from pipelines.methods import METHODS
from pipelines.methods.base import TrainingConfig
from pipelines.methods.optimization import learning_rate
from tests.small_clip import small_clip, toy_data

TRAINED = [name for name, module in METHODS.items() if module.Config().head.trainable]


def job(name, *, seed=0, **training):
    # A linear probe starts at zero and needs larger steps than a context.
    lr = 0.2 if METHODS[name].Config().head.name == "linear_probe" else 0.02
    training = {"epochs": 4, "batch_size": 16, "lr": lr, "warmup_epochs": 1, **training}
    # The published alpha belongs to logits several times larger than these.
    # The toy's domains are random: their penalty alone keeps the logits small for long.
    extra = {"balanced_energy": {"alpha": 1.0}, "bayes_cal": {"irm_weight": 0.1}}.get(name, {})
    config = METHODS[name].Config(training=training, **extra)
    if "num_context" in type(config.head).model_fields:
        head = config.head.model_copy(update={"num_context": 4})
        config = config.model_copy(update={"head": head})
    return TrainingJob(config, seed)


class Memory:
    """A checkpoint that remembers every epoch and may fail after one of them."""

    def __init__(self, stop_after=None):
        self.saved, self.stop_after = [], stop_after

    def load(self):
        return self.saved[-1] if self.saved else None

    def save(self, content):
        self.saved.append(content)
        if len(self.saved) == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(name):
    clip, data = small_clip(), toy_data()
    first = train_in_process(job(name), data, clip)
    torch.randn(7)  # the state of the caller's random numbers is no part of a run
    again = train_in_process(job(name), data, clip)
    other = train_in_process(job(name, seed=1), data, clip)
    assert first.predictor.files() == again.predictor.files()
    assert first.history == again.history
    assert first.predictor.files() != other.predictor.files()


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    ("optimizer", "epoch"),
    [
        ("sgd", 1),
        pytest.param("sgd", 3, marks=pytest.mark.slow),
        pytest.param("adamw", 1, marks=pytest.mark.slow),
        pytest.param("adamw", 3, marks=pytest.mark.slow),
    ],
)
def test_interrupted_after_an_epoch_it_ends_with_the_undisturbed_bytes(name, optimizer, epoch):
    clip, data = small_clip(), toy_data()
    undisturbed = train_in_process(job(name, optimizer=optimizer), data, clip)
    memory = Memory(stop_after=epoch)
    with pytest.raises(KeyboardInterrupt):
        train_in_process(job(name, optimizer=optimizer), data, clip, checkpoint=memory)
    resumed = train_in_process(job(name, optimizer=optimizer), data, clip, checkpoint=memory)
    assert len(memory.saved) == 4
    assert resumed.last.files() == undisturbed.last.files()
    assert resumed.predictor.files() == undisturbed.predictor.files()
    assert resumed.history == undisturbed.history


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_on_the_training_images_falls_to_seven_tenths(name):
    result = train_in_process(job(name, epochs=12, warmup_epochs=0), toy_data(), small_clip())
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["loss/cross_entropy"] < 0.7 * first["loss/cross_entropy"]


def test_the_callers_random_state_and_threads_are_left_alone():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train_in_process(job("coop"), toy_data(), small_clip())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_kept_epoch_has_the_best_validation_accuracy_then_cross_entropy():
    data = toy_data()
    result = train_in_process(job("coop", epochs=8, lr=0.3), data, small_clip())
    ranks = [
        (-report["validation/accuracy"], report["validation/cross_entropy"], report["epoch"])
        for report in result.history
    ]
    assert min(ranks)[2] == result.best_epoch
    logits = result.predictor.similarity(data.validation_features) * 10.0
    share = float((logits.argmax(axis=1) == data.validation_labels).mean())
    assert share == pytest.approx(-min(ranks)[0], abs=1e-6)


def test_without_validation_images_the_last_epoch_is_kept():
    data = toy_data()
    data = dataclasses.replace(
        data,
        validation_features=data.validation_features[:0],
        validation_labels=data.validation_labels[:0],
    )
    result = train_in_process(job("coop"), data, small_clip())
    assert result.best_epoch == 4
    assert result.predictor.files() == result.last.files()


def test_the_backbone_is_not_changed():
    clip = small_clip()
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    train_in_process(job("coop"), toy_data(), clip)
    assert all(torch.equal(before[name], v) for name, v in clip.model.state_dict().items())


def test_parts_of_a_batch_add_up_to_the_whole():
    whole = train_in_process(job("coop", epochs=1, warmup_epochs=0), toy_data(), small_clip())
    parts = train_in_process(
        job("coop", epochs=1, warmup_epochs=0, accumulate=3), toy_data(), small_clip()
    )
    a, b = (r.last.arrays["text_features"] for r in (whole, parts))
    assert np.abs(a - b).max() < 1e-5
    assert np.abs(a - b).max() > 0  # they were really computed apart


def test_learning_rates_drop_to_a_tenth_at_each_milestone():
    config = TrainingConfig(
        epochs=5, lr=0.8, warmup_epochs=1, warmup_lr=0.1, schedule="steps", milestones=(0.5, 0.75)
    )
    rates = [learning_rate(config, step, 4) for step in range(20)]
    assert rates == pytest.approx([0.1] * 4 + [0.8] * 8 + [0.08] * 4 + [0.008] * 4)
    for wrong in ((0.75, 0.5), (0.5, 1.0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="milestones="):
            TrainingConfig(milestones=wrong)


def test_learning_rates_are_a_constant_warm_up_and_a_cosine_per_step():
    config = TrainingConfig(epochs=5, warmup_epochs=1, lr=0.1, warmup_lr=1e-3, final_lr=0.02)
    rates = [learning_rate(config, step, 4) for step in range(20)]
    assert rates[:4] == [1e-3] * 4
    assert rates[4] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.06)  # half-way down the cosine
    expected = 0.02 + 0.08 * (1 + math.cos(math.pi * 15 / 16)) / 2
    assert rates[19] == pytest.approx(expected)


def test_a_class_without_images_is_named():
    data = toy_data()
    kept = data.labels != 2
    data = dataclasses.replace(data, features=data.features[kept], labels=data.labels[kept])
    with pytest.raises(UserError, match="no training image of: two red cats"):
        train_in_process(job("cross_entropy"), data, small_clip())  # a linear probe
    # Prompts are shared: they learn from the other classes, and this one keeps its name.
    learned = train_in_process(job("coop"), data, small_clip()).last
    similarity = learned.similarity(data.validation_features)
    assert similarity.shape[1] == len(data.class_names)
    assert np.isfinite(similarity).all()


def test_a_label_outside_the_class_list_is_refused():
    data = dataclasses.replace(toy_data(), labels=toy_data().labels + 1)
    with pytest.raises(UserError, match="labels from 1 to 4; the class list has 4"):
        train_in_process(job("coop"), data, small_clip())


def test_a_loss_that_is_no_number_stops_with_the_learning_rate_named():
    data = toy_data()
    broken = data.features.copy()
    broken[3, 2] = np.nan
    data = dataclasses.replace(data, features=broken)
    with pytest.raises(UserError, match=r"training\.lr"):
        train_in_process(job("coop"), data, small_clip())


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match="leaves nothing"):
        TrainingConfig(epochs=3, warmup_epochs=3)


def test_each_epoch_learns_from_the_next_view():
    """As if each epoch were trained on other features: A, B, then A again."""
    clip, plain = small_clip(), toy_data()
    others = [toy_data(seed).features for seed in (1, 2)]
    views = np.stack(others, axis=1)
    made = train_in_process(job("coop", epochs=3), dataclasses.replace(plain, views=views), clip)

    memory = Memory()
    for number, features in enumerate((others[0], others[1], others[0]), start=1):
        memory.stop_after = number if number < 3 else None
        data = dataclasses.replace(plain, features=features)
        try:
            expected = train_in_process(job("coop", epochs=3), data, clip, checkpoint=memory)
        except KeyboardInterrupt:
            continue
    assert made.last.files() == expected.last.files()
    assert made.history == expected.history
    one = train_in_process(
        job("coop", epochs=3), dataclasses.replace(plain, features=others[0]), clip
    )
    assert one.last.files() != made.last.files()


def test_settings_trained_together_learn_from_the_views_too():
    clip, data = small_clip(), toy_data()
    data = dataclasses.replace(data, views=np.stack([toy_data(s).features for s in (1, 2)], axis=1))
    jobs = [job("coop", lr=lr, epochs=2) for lr in (0.01, 0.02)]
    for found, one in zip(train_together(jobs, data, clip), jobs, strict=True):
        alone = train_in_process(one, data, clip)
        assert found.history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["locoop", "gallop"])
def test_methods_of_local_features_learn_from_the_images(name):
    clip, data = small_clip(), toy_data()
    views = np.stack([toy_data(s).features for s in (1, 2)], axis=1)
    with_views = train_in_process(job(name), dataclasses.replace(data, views=views), clip)
    assert with_views.last.files() == train_in_process(job(name), data, clip).last.files()
