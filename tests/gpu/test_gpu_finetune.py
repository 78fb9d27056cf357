"""Fine-tuning on a GPU: `python -m pytest tests/gpu`; skipped where there is none."""

import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.backbones import network as backbones
from pipelines.compute.cluster import ComputeConfig, connect
from pipelines.data.storage import Storage
from pipelines.finetune.cache import load_predictor
from pipelines.finetune.loop import train_in_process
from pipelines.finetune.stage import TrainingJob, train
from pipelines.heads import HeadContext, build
from pipelines.heads.coop import Config as CoOpConfig
from pipelines.methods import METHODS
from pipelines.speed import prompts
from tests.small_clip import toy_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

TRAINING = {"epochs": 5, "batch_size": 25, "lr": 0.02, "warmup_epochs": 1}


def cell(name, **training):
    head = {"name": "coop", "num_context": 4}
    return TrainingJob(METHODS[name].Config(head=head, training={**TRAINING, **training}), 0)


def backbone_of(folder):
    from tests.ray.small_backbone import write_backbone

    return write_backbone(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fit_on_gpus_gives_the_weights_of_the_cpu(workers, tmp_path):
    """Ray Train on GPUs exchanges by NCCL: gloo's all_gather takes no CUDA tensor."""
    if torch.cuda.device_count() < workers:
        pytest.skip(f"needs {workers} GPUs")
    backbone, data = backbone_of(tmp_path), toy_data()
    cells = [cell("ebm"), cell("energy_margin")]
    on_gpu, on_cpu = Storage(str(tmp_path / "gpu")), Storage(str(tmp_path / "cpu"))
    with connect(ComputeConfig(num_cpus=6)):
        compute = ComputeConfig(train_workers=workers, train_gpus=1)
        heads = train(cells, data, backbone, on_gpu, compute=compute)
    again = train(cells, data, backbone, on_cpu, compute=ComputeConfig(), mode="in_process")
    assert heads == again
    for head in heads:
        found, expected = (load_predictor(s, head, "last") for s in (on_gpu, on_cpu))
        a, b = found.arrays["text_features"], expected.arrays["text_features"]
        assert np.abs(a - b).max() < 2e-3  # TF32 may be on


@pytest.mark.parametrize("name", ["coop", "ebm", "balanced_energy"])
def test_mixed_precision_stays_near_float32(name, tmp_path):
    clip, data = backbones.load(backbone_of(tmp_path), device="cuda"), toy_data()
    full = train_in_process(cell(name), data, clip)
    half = train_in_process(cell(name, precision="bf16"), data, clip)
    a, b = full.last.arrays["text_features"], half.last.arrays["text_features"]
    moved = np.linalg.norm(a - train_in_process(cell(name, epochs=1), data, clip).last.arrays[
        "text_features"
    ])  # fmt: skip
    assert np.linalg.norm(a - b) < 0.25 * moved
    losses = [result.history[-1]["loss"] for result in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    accuracies = [result.history[-1]["validation/accuracy"] for result in (full, half)]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.1)


def test_a_step_beside_the_plain_77_token_step():
    """ViT-B/16's text tower, 100 classes, 16 context tokens, a batch of 256 cached features."""
    torch.manual_seed(0)
    backbone = prompts._backbone(images=False)
    backbone.model.cuda()
    names = prompts.class_names(100)
    features = F.normalize(torch.randn(256, backbone.embed_dim), dim=-1).cuda()
    labels = torch.randint(100, (256,)).cuda()
    context = HeadContext(backbone, names, ("{}",), features, labels)
    head = build(CoOpConfig(num_context=16), context, 0).to("cuda")
    encoders = {
        "shared": head.text_features,
        "plain": prompts._plain_encoder(head, backbone, names),
    }
    optimizer = torch.optim.SGD([head.context], lr=1e-3)

    def step(encode):
        optimizer.zero_grad()
        F.cross_entropy(features @ encode().T * backbone.logit_scale, labels).backward()
        optimizer.step()

    seconds, peaks = {}, {}
    for name, encode in encoders.items():
        step(encode)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step(encode)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
        peaks[name] = torch.cuda.max_memory_allocated() - before
    print(json.dumps({"seconds": seconds, "peak_bytes": peaks}))
    # Far from the CPU's 0.08: a GPU is not busy with so little. Only a broken path fails.
    assert seconds["shared"] < 0.7 * seconds["plain"]
    assert peaks["shared"] < 0.4 * peaks["plain"]
