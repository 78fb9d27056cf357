"""LoCoOp, NegPrompt and GalLoP: what they reduce to, and their update worked out by hand.

The hand's text features go through the tower's own `encode_text`-like forward on whole prompts
in float64, its losses through loops over floats, its gradients through central differences.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.finetune import loop
from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import HeadContext, Predictor, build
from pipelines.heads.comparisons import global_similarity, local_similarity, negative_similarity
from pipelines.heads.gallop import num_averaged
from pipelines.methods import METHODS
from pipelines.methods.locoop import num_top
from tests.small_clip import small_clip, toy_data

PROMPT = {"num_context": 2}
ONE_STEP = {
    "epochs": 1,
    "batch_size": 96,
    "lr": 0.5,
    "warmup_epochs": 0,
    "momentum": 0.0,
    "weight_decay": 0.0,
}
SHORT = {"epochs": 3, "batch_size": 40, "lr": 0.1, "warmup_epochs": 1}


def train(name, training=SHORT, *, data=None, seed=3, **settings):
    config = METHODS[name].Config(training=training, **settings)
    return train_in_process(TrainingJob(config, seed), data or toy_data(), small_clip())


def bytes_of(trained, *names):
    return [trained.predictor.arrays[name].tobytes() for name in names]


def test_locoop_without_its_term_is_coop_to_the_bit():
    coop = train("coop", head={"name": "coop", **PROMPT})
    plain = train("locoop", head={"name": "coop", **PROMPT}, weight=0.0)
    assert plain.history == coop.history
    assert plain.predictor.files() == coop.predictor.files()
    # And with it, it is not.
    full = train("locoop", head={"name": "coop", **PROMPT}, weight=0.25)
    assert bytes_of(full, "text_features") != bytes_of(coop, "text_features")


def test_gallop_with_one_global_prompt_is_coop():
    coop = train("coop", head={"name": "coop", **PROMPT})
    head = {"name": "gallop", "prompt": PROMPT, "num_global": 1, "scales": []}
    plain = train("gallop", head=head, dropout=0.0)
    np.testing.assert_allclose(
        plain.predictor.arrays["text_features"],
        coop.predictor.arrays["text_features"],
        rtol=0,
        atol=1e-6,
    )
    assert plain.best_epoch == coop.best_epoch
    assert set(plain.predictor.arrays) == {"text_features"}


def test_negprompt_without_its_terms_is_coop():
    coop = train("coop", head={"name": "coop", **PROMPT})
    off = {"image_weight": 0.0, "class_weight": 0.0, "spread_weight": 0.0}
    plain = train("negprompt", head={"name": "negprompt", "prompt": PROMPT}, **off)
    assert bytes_of(plain, "text_features") == bytes_of(coop, "text_features")


def test_negative_prompts_begin_apart_and_move_from_images():
    result = train(
        "negprompt",
        {**SHORT, "epochs": 10, "lr": 0.002},
        head={"name": "negprompt", "prompt": {"init_phrase": "a photo of a"}},
    )
    first, last = result.history[0], result.history[-1]
    assert last["negative/images"] < 0.6 * first["negative/images"]
    negatives = result.predictor.arrays["negative_text_features"].reshape(4, 2, 16)
    cosines = (negatives[:, 0] * negatives[:, 1]).sum(axis=1)
    assert (np.abs(cosines) < 0.9999).all()


@pytest.mark.parametrize(
    ("number", "counts"),
    [(196, [5, 10, 15, 20]), (49, [1, 2, 4, 5]), (4, [1, 2, 3, 4]), (3, [1, 2, 3, 3])],
)
def test_the_scales_are_the_published_numbers_of_vit_b16(number, counts):
    assert num_averaged([0.025, 0.05, 0.075, 0.1], number) == counts


@pytest.mark.parametrize(("classes", "top"), [(1000, 200), (7, 1), (2, 1), (10, 2)])
def test_locoops_top_classes_are_in_proportion(classes, top):
    assert num_top(METHODS["locoop"].Config(), classes) == top


# By hand: the backbone in float64, whole prompts, one class after the other.


class Hand:
    """Text features of learned contexts, through the tower's own modules."""

    def __init__(self, clip, class_names):
        self.model = copy.deepcopy(clip.model).double()
        self.tokens = clip.tokenizer([f"{name}." for name in class_names])

    def text(self, context):
        """Unit features, one list a class, of contexts (C, W) between start and name."""
        model, rows = self.model, []
        with torch.no_grad():
            for tokens in self.tokens:
                end = int(tokens.argmax())
                words = model.token_embedding(tokens[: end + 1])
                prompt = torch.cat((words[:1], torch.tensor(context), words[1:]))[None]
                x = prompt + model.positional_embedding[: prompt.shape[1]]
                mask = torch.full((x.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
                x = model.ln_final(model.transformer(x, attn_mask=mask))
                row = (x[0, -1] @ model.text_projection).tolist()
                length = math.sqrt(sum(v * v for v in row))
                rows.append([v / length for v in row])
        return rows


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def log_softmax(row):
    top = max(row)
    total = top + math.log(sum(math.exp(v - top) for v in row))
    return [v - total for v in row]


def entropy_loss(rows, labels):
    return mean(-log_softmax(row)[y] for row, y in zip(rows, labels, strict=True))


def locoop_by_hand(hand, parameters, data, config):
    text = hand.text(parameters["context"])
    rows = [[10 * dot(z, h) for h in text] for z in data.features.tolist()]
    found = []
    for local, label in zip(data.columns["local_features"].tolist(), data.labels, strict=True):
        for feature in local:
            logs = log_softmax([10 * dot(feature, h) for h in text])
            if label not in sorted(range(4), key=lambda k: -logs[k])[:2]:
                found.append(-sum(math.exp(v) * v for v in logs))
    assert 3 < len(found) < 3 * len(data.labels)
    return entropy_loss(rows, data.labels) - config.weight * mean(found)


def negprompt_by_hand(hand, parameters, data, config):
    text = hand.text(parameters["positive.context"])
    others = [hand.text(parameters[f"negatives.{n}.context"]) for n in range(2)]
    rows = [[10 * dot(z, h) for h in text] for z in data.features.tolist()]
    away = []
    for z, row in zip(data.features.tolist(), rows, strict=True):
        negative = [10 * dot(z, h) for prompt in others for h in prompt]
        inside = sum(map(math.exp, row))
        away.append(-math.log(inside / (inside + sum(map(math.exp, negative)))))
    near = mean(dot(h, prompt[k]) for prompt in others for k, h in enumerate(text))
    alike = mean(dot(a, b) for a, b in zip(*others, strict=True))
    return (
        entropy_loss(rows, data.labels)
        + config.image_weight * mean(away)
        + config.class_weight * near
        + config.spread_weight * alike
    )


def gallop_by_hand(hand, parameters, data, config):
    texts = [hand.text(parameters[f"prompts.{n}.context"]) for n in range(2)]
    images = data.features.tolist()
    rows = [[5 * (dot(z, a) + dot(z, b)) for a, b in zip(*texts, strict=True)] for z in images]
    total, losses = entropy_loss(rows, data.labels), []
    for number, count in enumerate((1, 2)):
        text = hand.text(parameters[f"local_prompts.{number}.context"])
        rows = []
        for local in data.columns["local_features"].tolist():
            moved = [[dot(w, p) for w in parameters["projection"].tolist()] for p in local]
            moved = [[v / math.sqrt(dot(p, p)) for v in p] for p in moved]
            best = [sorted((dot(p, h) for p in moved), reverse=True)[:count] for h in text]
            rows.append([10 * mean(values) for values in best])
        losses.append(entropy_loss(rows, data.labels))
    assert config.dropout == 0
    return total + mean(losses)


BY_HAND = {
    "locoop": (
        locoop_by_hand,
        {"name": "coop", **PROMPT},
        {"weight": 2.0, "top_share": 0.5},
    ),
    "negprompt": (
        negprompt_by_hand,
        {"name": "negprompt", "prompt": PROMPT},
        {"image_weight": 1.5, "class_weight": 2.0, "spread_weight": 1.2},
    ),
    "gallop": (
        gallop_by_hand,
        {"name": "gallop", "prompt": PROMPT, "num_global": 2, "scales": [0.3, 0.6]},
        {"dropout": 0.0},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_update_is_the_one_by_hand(name, monkeypatch):
    by_hand, head, settings = BY_HAND[name]
    data, clip = toy_data(per_class=4), small_clip()
    config = METHODS[name].Config(head=head, training=ONE_STEP, **settings)
    context = HeadContext(
        clip,
        data.class_names,
        data.templates,
        torch.tensor(data.features),
        torch.tensor(data.labels),
    )
    initial = build(config.head, context, training_run.stream(0, "head"))
    start = {n: p.detach().double().numpy() for n, p in initial.named_parameters()}
    moved = {}
    finish = loop.finish

    def watch(run):
        moved.update({n: p.detach().double().numpy().copy() for n, p in run.parameters.items()})
        return finish(run)

    monkeypatch.setattr(loop, "finish", watch)
    result = train_in_process(TrainingJob(config, 0), data, clip)
    hand = Hand(clip, data.class_names)
    expected = by_hand(hand, start, data, config)
    assert result.history[0]["loss"] == pytest.approx(expected, rel=2e-5)
    random = np.random.default_rng(0)
    for key, array in start.items():
        for place in [tuple(random.integers(size) for size in array.shape) for _ in range(3)]:
            ends = []
            for step in (1e-4, -1e-4):
                shifted = {k: v.copy() for k, v in start.items()}
                shifted[key][place] += step
                ends.append(by_hand(hand, shifted, data, config))
            gradient = (ends[0] - ends[1]) / 2e-4
            change = moved[key][place] - array[place]
            assert change == pytest.approx(-0.5 * gradient, rel=2e-3, abs=2e-6), (key, place)


def test_dropout_draws_prompts_for_each_image_anew():
    from pipelines.methods.gallop import _drawn

    torch.manual_seed(0)
    similarity = torch.arange(4.0)[None, :, None].expand(1000, 4, 2)
    one, three = _drawn(similarity, 0.75), _drawn(similarity, 0.25)
    counts = torch.bincount(one[:, 0].long(), minlength=4)
    assert (counts > 200).all()
    # Three of four: the mean without one of them, each as often as another.
    assert set((6 - 3 * three[:, 0]).round().int().tolist()) == {0, 1, 2, 3}
    assert torch.equal(_drawn(similarity, 0.0), torch.full((1000, 2), 1.5))


def gallop_predictor():
    head = {"name": "gallop", "prompt": PROMPT, "num_global": 2, "scales": [0.3, 0.6]}
    return train("gallop", {**SHORT, "epochs": 2}, head=head).predictor


def test_gallops_rule_is_its_heads_and_its_formula(tmp_path):
    predictor, data = gallop_predictor(), toy_data()
    features, local = data.validation_features, data.validation_columns["local_features"]
    arrays = predictor.arrays
    moved = local @ arrays["projection"].T
    moved /= np.linalg.norm(moved, axis=-1, keepdims=True)
    for row in (0, 9, 31):
        for k in range(4):
            whole = float(features[row] @ arrays["text_features"][k])
            parts = []
            for text, count in zip(arrays["local_text_features"], (1, 2), strict=True):
                parts.append(mean(sorted(float(p @ text[k]) for p in moved[row])[-count:]))
            found = predictor.similarity(features, local)[row, k]
            assert found == pytest.approx((whole + mean(parts)) / 2, abs=1e-6)
            assert global_similarity(predictor, features)[row, k] == pytest.approx(whole, abs=1e-6)
            each = local_similarity(predictor, local)[row, 1, k]
            text = arrays["local_text_features"][:, k].mean(axis=0)
            assert each == pytest.approx(float(moved[row, 1] @ text), abs=1e-6)
    predictor.save(tmp_path)
    loaded = Predictor.load(tmp_path)
    assert loaded.similarity(features, local).tobytes() == (
        predictor.similarity(features, local).tobytes()
    )
    # Validation accuracy, which chose the epoch, saw the local features.
    result = train("gallop", {**SHORT, "epochs": 2}, head=BY_HAND["gallop"][1])
    right = result.predictor.predicted(result.predictor.similarity(features, local))
    accuracy = float((right == data.validation_labels).mean())
    assert result.history[result.best_epoch - 1]["validation/accuracy"] == pytest.approx(accuracy)


def test_negprompts_own_negatives_stand_for_the_words():
    result = train("negprompt", head={"name": "negprompt", "prompt": PROMPT})
    data = toy_data()
    words = np.ones((3, 16), np.float32)
    found = negative_similarity(result.predictor, data.features, words)
    own = result.predictor.arrays["negative_text_features"]
    assert own.shape == (8, 16)
    np.testing.assert_allclose(found, data.features @ own.T, atol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_without_local_features_it_says_so_before_training(name):
    from pipelines.config import UserError

    bare = replace(toy_data(), columns={}, validation_columns={}, outlier_columns={})
    if name == "negprompt":  # the method reads none; its score does
        train(name, {**SHORT, "epochs": 2}, data=bare, head=BY_HAND[name][1])
        return
    with pytest.raises(UserError, match=f"method={name} with head=.*reads local_features"):
        train(name, data=bare, head=BY_HAND[name][1])
