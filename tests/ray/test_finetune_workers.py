"""Two Ray Train workers give one worker's weights, rows or classes divided between them."""

import io

import numpy as np
import pytest
import torch

from pipelines.compute.cluster import ComputeConfig
from pipelines.data.storage import Storage
from pipelines.finetune.cache import is_trained, load_checkpoint
from pipelines.finetune.loop import TrainingData, TrainingJob
from pipelines.finetune.stage import train
from pipelines.finetune.workers import CLASS_PARALLEL_FROM, _split
from pipelines.methods import METHODS
from tests.ray.small_backbone import write_backbone

STEPS = 2
# A batch is all there is, an odd number of images: one step an epoch, in unequal parts.
TRAINING = {"epochs": STEPS, "batch_size": 1000, "lr": 0.02, "warmup_epochs": 0}


def many_classes(num_classes=CLASS_PARALLEL_FROM + 1):
    rng = np.random.default_rng(0)

    def draw(count):
        rows = rng.normal(size=(count, 16))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    labels = np.arange(num_classes)
    return TrainingData(
        class_names=tuple(f"thing {k}" for k in range(num_classes)),
        templates=("a photo of a {}.",),
        features=draw(num_classes),
        labels=labels,
        validation_features=draw(num_classes),
        validation_labels=labels,
        outliers=draw(33),
        address="many",
    )


def jobs():
    context = {"name": "coop", "num_context": 4}
    outliers = {**TRAINING, "outlier_batch_size": 33}
    return {
        "coop": METHODS["coop"].Config(head=context, training=TRAINING),
        "ebm": METHODS["ebm"].Config(head=context, training=TRAINING),
        "balanced": METHODS["balanced_energy"].Config(head=context, training=outliers, alpha=1.0),
        "adapter": METHODS["ebm"].Config(head="clip_adapter", training=TRAINING),
        "probe": METHODS["energy_margin"].Config(
            head={"name": "linear_probe", "init": "text"}, training=outliers
        ),
    }


def weights(storage, head):
    content = load_checkpoint(storage, head)
    assert content is not None
    return torch.load(io.BytesIO(content), weights_only=True)["parameters"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_one_workers_weights(tmp_path):
    backbone, data = write_backbone(tmp_path), many_classes()
    todo = {name: TrainingJob(method, 0) for name, method in jobs().items()}
    divided = {name: _split(job, data) for name, job in todo.items()}
    assert set(divided.values()) == {"rows", "classes"}
    two, one = Storage(str(tmp_path / "two")), Storage(str(tmp_path / "one"))
    workers = ComputeConfig(train_workers=2)
    heads = train(list(todo.values()), data, backbone, two, compute=workers)
    again = train(list(todo.values()), data, backbone, one, compute=workers, mode="in_process")
    assert heads == again
    for name, head in zip(todo, heads, strict=True):
        assert is_trained(two, head)
        found, expected = weights(two, head), weights(one, head)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            error = float((found[key] - value).norm() / value.norm())
            assert error < 1e-6 * STEPS, (name, divided[name], key, error)
