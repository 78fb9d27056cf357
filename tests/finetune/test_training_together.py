"""Settings trained as one batched model end where each would end alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.config import UserError
from pipelines.finetune.loop import Trained, TrainingJob, train_in_process
from pipelines.finetune.together import shape_of, train_together
from pipelines.heads import coop
from pipelines.methods import METHODS
from tests.small_clip import small_clip, toy_data

LEARNED = ("coop", "ebm", "energy_margin", "outlier_exposure", "balanced_energy")
HEAD = {"name": "coop", "num_context": 3}
BASE = {"epochs": 4, "batch_size": 8, "warmup_epochs": 1}
# Cosines after training: the last bits of a product, carried on through every step.
ROUNDING = 2e-4
# What may differ inside a group: rates, optimisers, decay, warm-up.
TRAININGS = (
    {"lr": 0.02},
    {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.0},
    {"lr": 0.01, "optimizer": "adamw", "warmup_epochs": 0},
)


def jobs(name: str, *trainings: dict) -> list[TrainingJob]:
    # The mask of scope=image jumps where its entries change places: the last bits may decide.
    scope = {"scope": "top"} if name == "ebm" else {}
    return [
        TrainingJob(METHODS[name].Config(head=HEAD, training={**BASE, **training}, **scope), 0)
        for training in trainings
    ]


@pytest.mark.parametrize("name", LEARNED)
def test_each_head_is_the_one_that_is_trained_alone(name):
    clip, data = small_clip(), toy_data()
    group = jobs(name, *TRAININGS)
    assert len({shape_of(job.method) for job in group}) == 1
    together = train_together(group, data, clip)
    for job, found in zip(group, together, strict=True):
        assert isinstance(found, Trained)
        alone = train_in_process(job, data, clip)
        assert found.best_epoch == alone.best_epoch
        np.testing.assert_allclose(
            found.last.similarity(data.features),
            alone.last.similarity(data.features),
            atol=ROUNDING,
        )
        for ours, theirs in zip(found.history, alone.history, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    # The settings did make a difference, so that agreement is no accident.
    first, second, third = (f.last.similarity(data.features) for f in together)
    assert min(np.abs(first - second).max(), np.abs(second - third).max()) > 10 * ROUNDING


def test_a_setting_that_fails_leaves_the_others_as_they_are():
    clip, data = small_clip(), toy_data()
    good, bad, other = jobs("ebm", {"lr": 0.02}, {"lr": 1e30}, {"lr": 0.01})
    found = train_together([good, bad, other], data, clip)
    assert isinstance(found[1], UserError)
    assert "try a smaller training.lr" in str(found[1])
    for job, result in ((good, found[0]), (other, found[2])):
        alone = train_in_process(job, data, clip)
        np.testing.assert_allclose(
            result.last.similarity(data.features),
            alone.last.similarity(data.features),
            atol=ROUNDING,
        )
    errors = train_together([bad, bad], data, clip)
    assert all(isinstance(error, UserError) for error in errors)


def test_one_pass_of_the_tower_serves_a_step_of_all(monkeypatch):
    clip, data = small_clip(), toy_data()
    sizes = []
    encode = coop.encode_shared

    def count(tower, prefix, *args, **named):
        sizes.append(tuple(prefix.shape[:-2]))
        return encode(tower, prefix, *args, **named)

    monkeypatch.setattr(coop, "encode_shared", count)
    group = jobs("coop", *TRAININGS)
    train_together(group, data, clip)
    steps = -(-len(data.labels) // BASE["batch_size"])
    # A pass a step and one for validation, each epoch; then two frozen heads each.
    assert sizes[: BASE["epochs"] * (steps + 1)] == [(3,)] * (BASE["epochs"] * (steps + 1))
    assert len(sizes) - BASE["epochs"] * (steps + 1) == 2 * len(group)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"training": {**BASE, "epochs": 5}}, "another number of epochs"),
        ({"training": {**BASE, "batch_size": 4}}, "other batches"),
        ({"head": {**HEAD, "num_context": 2}}, "another length"),
    ],
)
def test_other_shapes_are_another_group(change, why):
    known = METHODS["coop"].Config(head=HEAD, training=BASE)
    other = METHODS["coop"].Config(**{"head": HEAD, "training": BASE, **change})
    assert shape_of(known) is not None
    assert shape_of(other) not in (None, shape_of(known)), why


@pytest.mark.parametrize(
    "change",
    [
        {"head": {"name": "linear_probe"}},
        {"head": {**HEAD, "class_specific": True}},
        {"head": {**HEAD, "position": "middle"}},
        {"training": {**BASE, "accumulate": 2}},
        {"training": {**BASE, "precision": "bf16"}},
    ],
)
def test_what_trains_alone(change):
    assert shape_of(METHODS["coop"].Config(**{"head": HEAD, "training": BASE, **change})) is None
