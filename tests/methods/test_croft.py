"""CRoFT against plain numpy: the energy's gradient derived by hand, the update by differences."""

import numpy as np
import pytest
import torch

from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import HeadContext, build
from pipelines.methods import METHODS
from tests.methods.test_every_method import DECAY, LR, SCALE, TEXT, three_class_toy
from tests.methods.test_every_method import ThreeClasses as Backbone
from tests.small_clip import small_clip, toy_data

NAMES = ("image_adapter", "text_adapter", "generator")
RATIOS = {"image_ratio": 0.3, "text_ratio": 0.6}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mixed(rows, matrix, ratio):
    return ratio * rows @ matrix.T + (1 - ratio) * rows


def log_softmax(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def cross_entropy(logits, labels):
    return -log_softmax(logits)[np.arange(len(labels)), labels].mean()


def similarity(values, z, ratios):
    images = unit(mixed(z, values["image_adapter"], ratios["image_ratio"]))
    texts = unit(mixed(np.array(TEXT), values["text_adapter"], ratios["text_ratio"]))
    return images @ texts.T


def length_of_energy_gradient(values, z, ratios):
    """By the chain rule: energy, cosine, normalisation, mixture."""
    text = np.array(TEXT)
    images = mixed(z, values["image_adapter"], ratios["image_ratio"])
    texts = mixed(text, values["text_adapter"], ratios["text_ratio"])
    pull = -np.exp(log_softmax(unit(images) @ unit(texts).T)) / len(z)  # energy by cosine
    total = 0.0
    for rows, others, weights, inputs, ratio in (
        (images, texts, pull, z, ratios["image_ratio"]),
        (texts, images, pull.T, text, ratios["text_ratio"]),
    ):
        directions = unit(rows)
        wanted = weights @ unit(others)
        along = (wanted * directions).sum(axis=1, keepdims=True) * directions
        free = (wanted - along) / np.linalg.norm(rows, axis=1, keepdims=True)
        total += ((ratio * free.T @ inputs) ** 2).sum()
    return total


def parts(config, values):
    """Of z: features, generated ones, cross-entropy of each, and how alike a class's are."""
    data = three_class_toy()
    z, labels = data.features.astype(np.float64), data.labels
    ratios = {name: getattr(config.head, name) for name in RATIOS}
    shifted = unit(z + z @ values["generator"].T)
    same = (labels[:, None] == labels[None, :]) * (shifted @ z.T)
    losses = [cross_entropy(SCALE * similarity(values, x, ratios), labels) for x in (z, shifted)]
    return z, shifted, losses, same.mean()


def objective(config, values):
    z, shifted, losses, alike = parts(config, values)
    total = losses[0]
    total += config.covariate_weight * (losses[1] + config.push_sign * config.push * alike)
    ratios = {name: getattr(config.head, name) for name in RATIOS}
    read = (z, shifted) if config.push_sign else (z,)
    gradients = (length_of_energy_gradient(values, part, ratios) for part in read)
    return total + config.gradient_weight * sum(gradients)


def inner_objective(config, values):
    _, _, losses, alike = parts(config, values)
    return config.covariate_weight * (losses[1] + config.push * alike)


def differences(config, start, objective=objective):
    found = {}
    for name, array in start.items():
        found[name] = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-6, -1e-6):
                shifted = {key: value.copy() for key, value in start.items()}
                shifted[name][place] += step
                ends.append(objective(config, shifted))
            found[name][place] = (ends[0] - ends[1]) / 2e-6
    return found


class Watched:
    """Keeps the parameters after the epoch."""

    def load(self):
        return None

    def save(self, content):
        import io

        state = torch.load(io.BytesIO(content), weights_only=True)
        self.parameters = {n: p.double().numpy() for n, p in state["parameters"].items()}


CASES = [
    {},
    {"covariate_weight": 2.0, "push": 3.0, "gradient_weight": 40.0},
    {"gradient_weight": 0.0},
    {"covariate_weight": 0.0, "gradient_weight": 40.0},
]


@pytest.mark.parametrize("weights", CASES)
def test_one_update_is_the_one_by_hand(weights):
    training = {"epochs": 1, "batch_size": 7, "lr": LR, "warmup_epochs": 0, "weight_decay": DECAY}
    config = METHODS["croft"].Config(head={"name": "croft", **RATIOS}, training=training, **weights)
    start = dict.fromkeys(NAMES, np.eye(4))
    gradients, watched = differences(config, start), Watched()
    result = train_in_process(
        TrainingJob(config, 0), three_class_toy(), Backbone(), checkpoint=watched
    )
    assert result.history[0]["loss"] == pytest.approx(objective(config, start), rel=1e-5)
    for name in NAMES:
        change = -LR * (gradients[name] + DECAY * start[name])
        np.testing.assert_allclose(watched.parameters[name] - start[name], change, atol=2e-6)
        assert np.abs(change).max() > 1e-3


@pytest.mark.parametrize(("steps", "sign"), [(0, 0), (1, -1), (3, 0)])
def test_the_published_updates_are_those_by_hand(steps, sign):
    training = {"epochs": 1, "batch_size": 7, "lr": 0.1, "warmup_epochs": 0, "momentum": 0.0}
    config = METHODS["croft"].Config(
        head={"name": "croft", **RATIOS},
        training={**training, "weight_decay": DECAY},
        covariate_weight=1.5,
        push=3.0,
        generator_steps=steps,
        push_sign=sign,
    )
    values, watched = dict.fromkeys(NAMES, np.eye(4)), Watched()
    for number in range(steps + 1):
        of = objective if number == steps else inner_objective
        last, gradients = of(config, values), differences(config, values, of)
        values = {n: v - 0.1 * (gradients[n] + DECAY * v) for n, v in values.items()}
    job = TrainingJob(config, 0)
    result = train_in_process(job, three_class_toy(), Backbone(), checkpoint=watched)
    assert result.history[0]["loss"] == pytest.approx(last, rel=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(watched.parameters[name], values[name], atol=4e-6)


def test_generator_steps_without_a_loss_are_refused():
    with pytest.raises(ValueError, match="generator_steps=2: with covariate_weight=0"):
        METHODS["croft"].Config(generator_steps=2, covariate_weight=0.0)


def test_each_weight_is_felt():
    sums = [
        objective(METHODS["croft"].Config(**weights), dict.fromkeys(NAMES, np.eye(4)))
        for weights in ({}, {"covariate_weight": 0.0}, {"push": 0.0}, {"gradient_weight": 0.0})
    ]
    assert min(abs(a - b) for i, a in enumerate(sums) for b in sums[:i]) > 1e-3


def test_with_ratios_of_zero_it_is_zero_shot_whatever_it_learned():
    clip, data = small_clip(), toy_data()
    training = {"epochs": 3, "batch_size": 32, "lr": 0.05, "warmup_epochs": 0}
    head = {"name": "croft", "image_ratio": 0.0, "text_ratio": 0.0}
    config = METHODS["croft"].Config(head=head, training=training)
    found = train_in_process(TrainingJob(config, 0), data, clip).last
    zero = train_in_process(TrainingJob(METHODS["zero_shot"].Config(), 0), data, clip).last
    expected = zero.similarity(data.validation_features)
    assert np.abs(found.similarity(data.validation_features) - expected).max() < 1e-6
    # With adapters at work the same training leaves zero-shot.
    moved = METHODS["croft"].Config(training=training)
    moved = train_in_process(TrainingJob(moved, 0), data, clip).last
    assert np.abs(moved.similarity(data.validation_features) - expected).max() > 1e-2


def test_it_starts_at_zero_shot_and_does_not_save_the_generator():
    clip, data = small_clip(), toy_data(per_class=2)
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    context = HeadContext(clip, data.class_names, data.templates, features, labels)
    head = build(METHODS["croft"].Config().head, context, 0)
    zero = build(METHODS["zero_shot"].Config().head, context, 0)
    assert torch.allclose(head(features), zero(features), atol=1e-6)
    assert set(head.predictor().arrays) == {"image_adapter", "text_features"}
