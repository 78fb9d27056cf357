"""Several workers give one worker's weights: two real processes, gloo, no Ray."""

import io
import itertools
import multiprocessing
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads.parallel import Workers
from pipelines.methods import METHODS
from tests.patience import PATIENCE
from tests.small_clip import small_clip, toy_data

EPOCHS, WORLD, SPLITS = 2, 2, ("rows", "classes")
TRAINING = {"epochs": EPOCHS, "batch_size": 25, "lr": 0.02, "warmup_epochs": 0}


class Weights:
    """Keeps each epoch's weights and never resumes."""

    def __init__(self):
        self.epochs = []

    def load(self):
        return None

    def save(self, content):
        state = torch.load(io.BytesIO(content), weights_only=True)
        self.epochs.append({n: v.double().numpy() for n, v in state["parameters"].items()})


def jobs():
    """One job a trained method; the batch of 25 does not divide by two."""
    found = {}
    for name, module in METHODS.items():
        # The published alpha belongs to logits several times larger than the toy's.
        own = {"alpha": 1.0} if name == "balanced_energy" else {}
        config = module.Config(training=TRAINING, **own)
        if not config.head.trainable:
            continue
        if "num_context" in type(config.head).model_fields:
            head = config.head.model_copy(update={"num_context": 4})
            config = config.model_copy(update={"head": head})
        if config.head.name == "gallop":
            # From N(0, 0.02) these steps are longer than the contexts, and rounding grows.
            phrase = config.head.prompt.model_copy(update={"init_phrase": "a photo of a"})
            small = {"prompt": phrase, "num_global": 2, "scales": [0.3, 0.6]}
            head = config.head.model_copy(update=small)
            config = config.model_copy(update={"head": head})
        found[name] = TrainingJob(config, 0)
    # Two stages of one epoch each, and updates before each update.
    stages = METHODS["negprompt"].Config(training={**TRAINING, "epochs": 1}, objective="published")
    inner = METHODS["croft"].Config(training=TRAINING, generator_steps=2, push_sign=-1)
    found["negprompt, published"] = TrainingJob(stages, 0)
    found["croft, published"] = TrainingJob(inner, 0)
    return found


def run(workers, names):
    results = {}
    for name in names:
        weights = Weights()
        train_in_process(
            jobs()[name], toy_data(), small_clip(), workers=workers, checkpoint=weights
        )
        results[name] = weights.epochs
    return results


def divisible(split):
    return [n for n, c in jobs().items() if split == "rows" or c.method.head.class_parallel]


def work(rank, place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=WORLD
        )
        results = {s: run(Workers(rank, WORLD, s), divisible(s)) for s in SPLITS}
        dist.barrier()
        dist.destroy_process_group()
    (Path(place) / f"{rank}.pickle").write_bytes(pickle.dumps(results))


@pytest.mark.slow
def test_two_workers_give_one_workers_weights(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(r, str(tmp_path))) for r in range(WORLD)]
    for process in processes:
        process.start()
    alone = run(Workers(), divisible("rows"))
    for process in processes:
        process.join(timeout=PATIENCE)
        assert process.exitcode == 0
    results = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]
    compared = 0
    for split in SPLITS:
        for name in divisible(split):
            for epoch, parameter in itertools.product(range(EPOCHS), alone[name][0]):
                expected = alone[name][epoch][parameter]
                first, second = (result[split][name][epoch][parameter] for result in results)
                assert np.array_equal(first, second)
                error = np.linalg.norm(first - expected) / np.linalg.norm(expected)
                assert error < 1e-6 * 4 * (epoch + 1), (split, name, parameter)
                compared += 1
    assert compared >= 2 * EPOCHS * len(SPLITS)
