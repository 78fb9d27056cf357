"""Each method's loss: by hand on small numbers, and reduced to the simpler one."""

import itertools
import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from pipelines.finetune import loop
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.methods import METHODS, AnyMethod
from pipelines.methods.base import Batch, Outputs
from tests.small_clip import small_clip, toy_data

IMAGES = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8]])
TEXT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]])
LABELS = torch.tensor([0, 2])


def outputs_of(images, text, scale=10.0):
    similarity = images @ text.T
    return Outputs(
        similarity=similarity,
        logits=similarity * scale,
        image_features=images,
        text_features=text,
        outlier_similarity=None,
        outlier_logits=None,
        logit_scale=scale,
    )


def by_hand_cross_entropy():
    # cosines: row 0 (0.8, 0.6, 0.48), row 1 (0, 0.6, 0.64); logits ten times that.
    rows = [([8.0, 6.0, 4.8], 0), ([0.0, 6.0, 6.4], 2)]
    return sum(math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in rows) / 2


def by_hand_bound(keep, scope):
    total = 0.0
    for z, y in zip(IMAGES.tolist(), LABELS.tolist(), strict=True):
        products = [a * b for a, b in zip(z, TEXT[y].tolist(), strict=True)]
        kept = sorted(range(3), key=lambda i: -products[i])[: max(1, round(keep * 3))]
        masked = [v if i in kept else 0.0 for i, v in enumerate(z)]
        before = [sum(a * b for a, b in zip(z, h, strict=True)) for h in TEXT.tolist()]
        after = [sum(a * b for a, b in zip(masked, h, strict=True)) for h in TEXT.tolist()]
        if scope == "top":
            after = [after[k] if k == y else before[k] for k in range(3)]
        total += math.log(sum(map(math.exp, after))) - math.log(sum(map(math.exp, before)))
    return total / 2


@pytest.mark.parametrize("name", ["coop", "zero_shot"])
def test_cross_entropy_by_hand(name):
    losses, _ = METHODS[name].loss(outputs_of(IMAGES, TEXT), Batch(LABELS), METHODS[name].Config())
    assert list(losses) == ["cross_entropy"]
    assert float(losses["cross_entropy"]) == pytest.approx(by_hand_cross_entropy(), rel=1e-5)


@pytest.mark.parametrize("scope", ["image", "top"])
@pytest.mark.parametrize("keep", [0.34, 0.67])
def test_ebm_adds_the_weighted_bound(keep, scope):
    config = METHODS["ebm"].Config(weight=2.5, keep=keep, scope=scope, tau=1.0)
    losses, report = METHODS["ebm"].loss(outputs_of(IMAGES, TEXT), Batch(LABELS), config)
    # E0 - E2 = log sum exp(masked) - log sum exp(whole): minimised together with it. The logit
    # scale is 10, so the weight counts 10 x 0.07.
    weighted = 2.5 * 0.7 * by_hand_bound(keep, scope)
    assert float(losses["bound"]) == pytest.approx(weighted, rel=1e-4)
    assert report["bound"] == pytest.approx(by_hand_bound(keep, scope), rel=1e-4)
    assert float(losses["cross_entropy"]) == pytest.approx(by_hand_cross_entropy(), rel=1e-5)
    assert 0.0 <= report["bound_positive_share"] <= 1.0


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_the_ratio_of_gradients_by_differences(scale):
    """Both gradients by central differences in float64, without autograd."""
    config = METHODS["ebm"].Config(weight=2.0, keep=0.67, tau=0.5)
    _, report = METHODS["ebm"].loss(outputs_of(IMAGES, TEXT, scale), Batch(LABELS), config)
    images, text = IMAGES.double().tolist(), TEXT.double()

    def bound(h):
        total = 0.0
        for z, y in zip(images, LABELS.tolist(), strict=True):
            products = [a * b for a, b in zip(z, TEXT[y].tolist(), strict=True)]  # mask: fixed
            kept = sorted(range(3), key=lambda i: -products[i])[:2]
            masked = [v if i in kept else 0.0 for i, v in enumerate(z)]
            sums = [
                sum(math.exp(sum(a * b for a, b in zip(x, row, strict=True)) / 0.5) for row in h)
                for x in (masked, z)
            ]
            total += math.log(sums[0]) - math.log(sums[1])
        return total / 2

    def cross_entropy(h):
        total = 0.0
        for z, y in zip(images, LABELS.tolist(), strict=True):
            logits = [scale * sum(a * b for a, b in zip(z, row, strict=True)) for row in h]
            total += math.log(sum(math.exp(v) for v in logits)) - logits[y]
        return total / 2

    def norm(function):
        squares = 0.0
        for place in itertools.product(range(3), range(3)):
            values = []
            for step in (1e-6, -1e-6):
                moved = text.clone()
                moved[place] += step
                values.append(function(moved.tolist()))
            squares += ((values[0] - values[1]) / 2e-6) ** 2
        return math.sqrt(squares)

    expected = 2.0 * scale * 0.07 * norm(bound) / norm(cross_entropy)
    assert report["bound_gradient_ratio"] == pytest.approx(expected, rel=1e-4)


def test_a_bound_that_keeps_everything_is_zero():
    config = METHODS["ebm"].Config(keep=1.0)
    losses, report = METHODS["ebm"].loss(outputs_of(IMAGES, TEXT), Batch(LABELS), config)
    assert float(losses["bound"]) == 0.0
    assert report["bound_positive_share"] == 0.0


def test_ebm_without_weight_is_coop_to_the_last_bit():
    training = {"epochs": 3, "batch_size": 16, "lr": 0.02}
    head = {"name": "coop", "num_context": 4}
    clip, data = small_clip(), toy_data()
    results = [
        train_in_process(TrainingJob(METHODS[name].Config(**extra), 0), data, clip)
        for name, extra in (
            ("coop", {"head": head, "training": training}),
            ("ebm", {"head": head, "training": training, "weight": 0.0}),
            ("ebm", {"head": head, "training": training, "weight": 5.0}),
        )
    ]
    text = [result.last.arrays["text_features"] for result in results]
    assert (text[0] == text[1]).all()
    assert (text[0] != text[2]).any()


@pytest.mark.parametrize("name", ["coop", "ebm"])
def test_one_update_is_the_gradient_by_finite_differences(name, monkeypatch):
    """One step of plain SGD moves the context by -lr x gradient of the summed losses."""
    lr, clip, data = 0.05, small_clip(), toy_data(per_class=3)
    training = {
        "epochs": 1,
        "batch_size": 64,
        "lr": lr,
        "warmup_epochs": 0,
        "momentum": 0.0,
        "weight_decay": 0.0,
    }
    head = {"name": "coop", "num_context": 2}
    # The mask of scope=image jumps where its entries change places; that of top does not.
    extra = {"scope": "top"} if name == "ebm" else {}
    config = METHODS[name].Config(head=head, training=training, **extra)

    contexts = []
    finish = loop.finish

    def watch(run):
        contexts.append(run.head.context.detach().clone())
        return finish(run)

    monkeypatch.setattr(loop, "finish", watch)
    train_in_process(TrainingJob(config, 0), data, clip)
    run = loop.start(TrainingJob(config, 0), data, clip, loop.Workers())
    start = run.head.context.detach().double()

    def objective(context):
        run.head.context.data = context.float()
        text = run.head.text_features().detach()
        result = outputs_of(torch.tensor(data.features), text, clip.logit_scale)
        losses, _ = METHODS[name].loss(result, Batch(torch.tensor(data.labels)), config)
        return float(sum(losses.values()))

    moved = (start - contexts[0].double()) / lr
    direction = moved / moved.norm()
    step = 1e-3
    slope = (objective(start + step * direction) - objective(start - step * direction)) / (2 * step)
    assert slope == pytest.approx(float(moved.norm()), rel=2e-2)
    assert float(moved.norm()) > 1e-2


def test_any_method_is_told_by_name_and_refuses_what_it_cannot_train():
    adapter = TypeAdapter(AnyMethod)
    parsed = adapter.validate_python({"name": "ebm", "weight": 0.25})
    assert type(parsed) is METHODS["ebm"].Config
    assert parsed.weight == 0.25
    with pytest.raises(ValidationError, match="head=zero_shot has nothing to train"):
        adapter.validate_python({"name": "coop", "head": "zero_shot"})
    with pytest.raises(ValidationError, match="weigth"):
        adapter.validate_python({"name": "ebm", "weigth": 0.25})
    with pytest.raises(ValidationError, match="keep"):
        adapter.validate_python({"name": "ebm", "keep": 0.0})


@pytest.mark.parametrize("name", ["energy_correction", "feature_ebm"])
def test_energy_models_have_the_six_linear_layers_of_lafon_2022(name):
    assert METHODS[name].Config().hidden + 1 == 6
