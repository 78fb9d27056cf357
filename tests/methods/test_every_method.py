"""What every method must do: one update by hand, frozen parts, a falling loss, the same bits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.config import load
from pipelines.finetune import loop
from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingData, TrainingJob, train_in_process
from pipelines.heads import HEADS as ALL_HEADS
from pipelines.heads import HeadContext, Predictor, build
from pipelines.methods import METHODS
from pipelines.settings.config import PipelineConfig
from tests.small_clip import small_backbone, small_clip, toy_data

# The methods as `method=NAME` gives them, heads and all.
PRESETS = load(PipelineConfig, "pipeline", ["methods=all"]).methods
TRAINED = [name for name, method in PRESETS.items() if method.head.trainable]

SCALE = 4.0
TEXT = [[0.8, 0.6, 0.0, 0.0], [0.0, 0.8, 0.0, 0.6], [0.36, 0.0, 0.48, 0.8]]
LR, DECAY, MOMENTUM = 0.5, 0.01, 0.9


class ThreeClasses:
    """A backbone of three known text features."""

    model = torch.nn.Linear(1, 1)
    tokenizer = None
    embed_dim = 4
    logit_scale = SCALE
    name, device = "three classes", torch.device("cpu")

    def encode_text(self, texts):
        return torch.tensor(TEXT)[: len(texts)]


def unit(rows):
    rows = np.asarray(rows)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def three_class_toy():
    rng = np.random.default_rng(3)
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    features = unit(np.array(TEXT)[labels] + 0.4 * rng.normal(size=(7, 4)))
    return TrainingData(
        class_names=("a", "b", "c"),
        templates=("{}",),
        features=features,
        labels=labels,
        validation_features=features[:0],
        validation_labels=labels[:0],
        outliers=unit(rng.normal(size=(5, 4))),
        address="three",
    )


# By hand: plain Python numbers in float64 from here to `objective`.


def lse(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values):
    return sum(values) / len(values)


def zero_shot(rows):
    return [[SCALE * dot(z, h) for h in TEXT] for z in rows]


def linear(arrays, z):
    return [dot(w, z) + b for w, b in zip(arrays["weight"], arrays["bias"], strict=True)], z


def adapter(arrays, z, ratio=0.2):
    hidden = [max(0.0, dot(w, z)) for w in arrays["down"]]
    adapted = [max(0.0, dot(w, hidden)) for w in arrays["up"]]
    mixed = [ratio * a + (1 - ratio) * v for a, v in zip(adapted, z, strict=True)]
    norm = math.sqrt(dot(mixed, mixed))
    mixed = [v / norm for v in mixed]
    return [dot(mixed, h) for h in TEXT], mixed


HEADS = {"linear_probe": linear, "clip_adapter": adapter}


def bound(z, y, keep, scope, tau):
    """E0 - E2 of one image."""
    products = [a * b for a, b in zip(z, TEXT[y], strict=True)]
    kept = sorted(range(4), key=lambda i: -products[i])[: max(1, round(keep * 4))]
    masked = [v if i in kept else 0.0 for i, v in enumerate(z)]
    before = [dot(z, h) / tau for h in TEXT]
    after = [dot(masked, h) / tau for h in TEXT]
    if scope == "top":
        after = [after[k] if k == y else before[k] for k in range(3)]
    return lse(after) - lse(before)


def extra_loss(config, images, labels, outliers, arrays):
    """The method's loss beside cross-entropy."""
    head = HEADS[config.head.name]
    name, data = config.name, three_class_toy()
    if name in ("coop", "cross_entropy"):
        return 0.0
    if name == "ebm":
        pairs = zip(images, labels, strict=True)
        args = (config.keep, config.scope, config.tau)
        weight = config.weight * SCALE * 0.07  # the bound's weight follows the logit scale
        return weight * mean([bound(head(arrays, z)[1], y, *args) for z, y in pairs])
    logits = [[SCALE * s for s in head(arrays, z)[0]] for z in outliers]
    if name == "outlier_exposure":
        return config.weight * mean([lse(f) - mean(f) for f in logits])
    start_in, start_out = zero_shot(data.features.tolist()), zero_shot(data.outliers.tolist())
    m_in, m_out = sorted((-mean([lse(f) for f in start_in]), -mean([lse(f) for f in start_out])))
    if config.m_in is not None:
        m_in, m_out = config.m_in, config.m_out
    inside = [-lse([SCALE * s for s in head(arrays, z)[0]]) for z in images]
    outside = [-lse(f) for f in logits]
    if name == "energy_margin" and config.hinge == "single":
        return config.weight * max(0.0, mean(inside) - mean(outside) + m_out - m_in)
    hinge = mean([max(0.0, e - m_in) ** 2 for e in inside])
    if name == "energy_margin":
        return config.weight * (hinge + mean([max(0.0, m_out - e) ** 2 for e in outside]))
    return config.weight * (hinge + balanced(config, logits, outside, start_out, m_out))


def balanced(config, logits, energies, start, m_out):
    counts = [sum(f.index(max(f)) == k for f in start) for k in range(3)]
    powers = [(n / sum(counts)) ** config.gamma for n in counts]
    prior = [p / sum(powers) for p in powers]
    weights = [dot([math.exp(v - lse(f)) for v in f], prior) for f in logits]
    alpha = 3 if config.alpha is None else config.alpha  # the number of classes
    margins = [m_out + alpha * z for z in weights]
    terms = [z * max(0.0, m - e) ** 2 for z, m, e in zip(weights, margins, energies, strict=True)]
    return sum(terms) / (sum(weights) if config.reduction == "weighted" else len(terms))


def objective(config, arrays):
    data = three_class_toy()
    images, labels = data.features.tolist(), data.labels.tolist()
    rows = [[SCALE * s for s in HEADS[config.head.name](arrays, z)[0]] for z in images]
    entropy = mean([lse(f) - f[y] for f, y in zip(rows, labels, strict=True)])
    return entropy + extra_loss(config, images, labels, data.outliers.tolist(), arrays)


def by_hand(config, start, nesterov):
    """The arrays after one step of SGD, by central differences of the objective."""
    moved = {}
    for name, array in start.items():
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-6, -1e-6):
                shifted = {key: value.copy() for key, value in start.items()}
                shifted[name][place] += step
                plain = {key: value.tolist() for key, value in shifted.items()}
                ends.append(objective(config, plain))
            gradient[place] = (ends[0] - ends[1]) / 2e-6
        direction = gradient + DECAY * array
        moved[name] = array - LR * direction * (1 + MOMENTUM if nesterov else 1)
    return moved


TEXT_PROBE = {"name": "linear_probe", "init": "text"}
CASES = [
    ("coop", TEXT_PROBE, {}),
    ("cross_entropy", {"name": "clip_adapter", "reduction": 2}, {}),
    ("ebm", {"name": "clip_adapter", "reduction": 2}, {"weight": 3.0, "tau": 0.3, "keep": 0.5}),
    ("ebm", {"name": "clip_adapter", "reduction": 2}, {"weight": 3.0, "tau": 0.3, "scope": "top"}),
    ("energy_margin", TEXT_PROBE, {"weight": 0.7}),
    ("energy_margin", TEXT_PROBE, {"weight": 0.7, "m_in": -4.5, "m_out": -3.0}),
    # From the data its margin is the gap there is, and it would do nothing at first.
    (
        "energy_margin",
        TEXT_PROBE,
        {"weight": 0.7, "hinge": "single", "m_in": -5.0, "m_out": -2.0},
    ),
    ("outlier_exposure", TEXT_PROBE, {"weight": 0.5}),
    ("balanced_energy", TEXT_PROBE, {"weight": 0.7, "alpha": 2.0, "gamma": 0.5}),
    ("balanced_energy", TEXT_PROBE, {"weight": 0.7, "gamma": 0.5}),
    (
        "balanced_energy",
        TEXT_PROBE,
        {"weight": 0.7, "alpha": 2.0, "gamma": 0.5, "reduction": "mean"},
    ),
]


# Their update by hand is in test_local_methods.py: it goes through prompts and local features.
WITH_PROMPTS = {"locoop", "negprompt", "gallop"}
# Their loss is cross-entropy alone, if their head is trained: what is theirs is a density.
DENSITIES = {"energy_correction", "feature_ebm", "gaussian_mixture"}


# Methods that change a head of their own in training: their update by hand is in their own file.
OWN_FILES = {"bayes_cal", "cocoop", "croft", "dplclip", "fa"}
# They train whole networks: their update by hand is in tests/train/test_loop.py.
OF_NETWORKS = {"logit_adjustment", "oecc", "open_sampling", "pascl"}


def test_every_method_has_its_update_by_hand():
    others = {"zero_shot", "classifier"} | DENSITIES | OWN_FILES | WITH_PROMPTS | OF_NETWORKS
    assert {name for name, *_ in CASES} == METHODS.keys() - others
    for name in OWN_FILES:
        content = (Path(__file__).parent / f"test_{name}.py").read_text()
        assert "def test_one_update_is_the_one_by_hand" in content


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("name", "head", "settings"), CASES)
def test_one_update_on_three_classes_is_the_one_by_hand(name, head, settings, nesterov):
    training = {
        "epochs": 1,
        "batch_size": 7,
        "lr": LR,
        "warmup_epochs": 0,
        "momentum": MOMENTUM,
        "nesterov": nesterov,
        "weight_decay": DECAY,
    }
    if METHODS[name].Config.needs_outliers:
        training["outlier_batch_size"] = 5
    config = METHODS[name].Config(head=head, training=training, **settings)
    clip, data = ThreeClasses(), three_class_toy()
    context = HeadContext(
        clip, data.class_names, data.templates, torch.tensor(data.features), torch.zeros(7).long()
    )
    learned = {"linear_probe": ("weight", "bias"), "clip_adapter": ("down", "up")}[head["name"]]
    initial = build(config.head, context, training_run.stream(0, "head")).predictor().arrays
    start = {key: initial[key].astype(np.float64) for key in learned}
    expected = by_hand(config, start, nesterov)
    # The loss beside cross-entropy is at work, or the case would show nothing.
    if name not in ("coop", "cross_entropy"):
        plain = {key: value.tolist() for key, value in start.items()}
        zero = config.model_copy(update={"weight": 0.0})
        assert abs(objective(config, plain) - objective(zero, plain)) > 1e-3
    found = train_in_process(TrainingJob(config, 0), data, clip).last.arrays
    for key in learned:
        change = expected[key] - start[key]
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(found[key] - start[key], change, rtol=2e-4, atol=2e-6)


def preset(name, **training):
    """A preset on the toy: fixed batches, since a batch is all there is."""
    method = PRESETS[name]
    rates = {"linear_probe": 0.5, "clip_adapter": 0.3}
    lr = rates.get(method.head.name, 0.02)
    outliers = {"outlier_batch_size": 40} if method.needs_outliers else {}
    update = {"epochs": 30, "batch_size": 96, "lr": lr, "warmup_epochs": 0, **outliers, **training}
    # The published alpha belongs to logits several times larger than these.
    more = {"alpha": 1.0} if method.name == "balanced_energy" else {}
    return method.model_copy(update={"training": method.training.model_copy(update=update), **more})


LEARNED = {
    "coop": {"context"},
    "linear_probe": {"weight", "bias"},
    "clip_adapter": {"down", "up"},
    "tip_adapter_f": {"keys"},
    "cocoop": {"context", "down", "down_bias", "up", "up_bias"},
    "dplclip": {f"layers.{n}.{name}" for n in range(3) for name in ("weight", "bias")},
    "croft": {"image_adapter", "text_adapter", "generator"},
    "bayes_cal": {f"{of}.{n}" for of in ("classes", "domains") for n in ("mean", "log_std")},
    "fa": {"forced.context"},
    "negprompt": {"positive.context", "negatives.0.context", "negatives.1.context"},
    "gallop": {
        "projection",
        *(
            f"{kind}.{number}.context"
            for kind in ("prompts", "local_prompts")
            for number in range(4)
        ),
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_falls_and_what_is_frozen_stays(name):
    clip, data, method = small_clip(), toy_data(), preset(name)
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    seen = []
    step = loop._step

    def watch(run, *args):
        trainable = {n for n, p in run.head.named_parameters() if p.requires_grad}
        buffers = {n: b.clone() for n, b in run.head.named_buffers()}
        report = step(run, *args)
        assert all(torch.equal(buffers[n], b) for n, b in run.head.named_buffers())
        seen.append(trainable)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", watch)
        result = train_in_process(TrainingJob(method, 0), data, clip)
    assert result.history[-1]["loss"] <= 0.7 * result.history[0]["loss"]
    assert len(seen) == 30
    assert all(trainable == LEARNED[method.head.name] for trainable in seen)
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    after = clip.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_saved_and_loaded_a_trained_head_gives_the_same_logits_to_the_bit(name, tmp_path):
    data = toy_data()
    method = preset(name, epochs=2) if name in TRAINED else PRESETS[name]
    predictor = train_in_process(TrainingJob(method, 0), data, small_clip()).predictor
    predictor.save(tmp_path)
    loaded = Predictor.load(tmp_path)
    given = (data.validation_features, data.validation_columns["local_features"])
    similarity = predictor.similarity(*given)
    assert np.array_equal(loaded.similarity(*given), similarity)
    assert loaded.logit_scale == predictor.logit_scale
    assert np.array_equal(loaded.predicted(similarity), similarity[:, :4].argmax(axis=1))


@pytest.mark.parametrize("phrase", [None, "a photo of a"])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_every_kind_of_prompt_learns(position, class_specific, phrase):
    head = {
        "name": "coop",
        "num_context": 3,
        "init_phrase": phrase,
        "class_specific": class_specific,
        "position": position,
    }
    training = {"epochs": 10, "batch_size": 96, "lr": 0.02, "warmup_epochs": 0}
    config = METHODS["coop"].Config(head=head, training=training)
    result = train_in_process(TrainingJob(config, 0), toy_data(), small_clip())
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]


# Losses that compare images with text features, and heads that have none; heads with nothing to
# train, and the methods that take them as they are.
REFUSED = {
    **{
        (method, head): "has no text features"
        for method in ("ebm", "locoop")
        for head in ("linear_probe", "tip_adapter_f", "cocoop", "dplclip")
    },
    **{
        ("negprompt", head): "no negative prompts|has no text features"
        for head in ALL_HEADS.keys() - {"negprompt"}
    },
    **{("gallop", head): "no global and local prompts" for head in ALL_HEADS.keys() - {"gallop"}},
    **{("fa", head): "no original prompts" for head in ALL_HEADS.keys() - {"fa"}},
    **{
        (method, head): "nothing to train|no text features"
        for method in METHODS.keys() - {"zero_shot", "cross_entropy", "classifier"} - DENSITIES
        for head in ("zero_shot", "tip_adapter", "classifier")
    },
    **{
        ("zero_shot", head): "is there to be trained"
        for head in ALL_HEADS
        if ALL_HEADS[head].Config.trainable
    },
    # Losses on what only one head gives.
    **{
        (name, head): f"method {name} .* its own head; allowed: {name}|nothing to train"
        for name in ("croft", "bayes_cal", "classifier")
        for head in ALL_HEADS.keys() - {name}
    },
    **{
        (method, head): "trains a whole network from pixels|nothing to train"
        for method in OF_NETWORKS
        for head in ALL_HEADS
    },
}
SMALL = {
    "coop": {"num_context": 2},
    "negprompt": {"prompt": {"num_context": 2}},
    "gallop": {"prompt": {"num_context": 2}, "num_global": 2, "scales": [0.3, 0.6]},
}


@pytest.mark.slow
@pytest.mark.parametrize("head", sorted(ALL_HEADS))
@pytest.mark.parametrize("name", sorted(METHODS))
def test_any_method_trains_any_head_or_says_why_not(name, head):
    training = {"epochs": 1, "batch_size": 96, "lr": 0.01}
    few = {"num_context": 2} if "num_context" in ALL_HEADS[head].Config.model_fields else {}
    settings = {"name": head, **SMALL.get(head, few)}
    if (name, head) in REFUSED:
        with pytest.raises(ValidationError, match=REFUSED[name, head]):
            METHODS[name].Config(head=settings, training=training)
        return
    config = METHODS[name].Config(head=settings, training=training)
    result = train_in_process(TrainingJob(config, 0), toy_data(), small_backbone(config.head))
    assert result.predictor.head == head
    data = toy_data()
    given = (data.validation_features, data.validation_columns["local_features"])
    assert np.isfinite(result.predictor.similarity(*given)).all()
