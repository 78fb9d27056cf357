"""CoCoOp's update by hand: finite differences of whole prompts through open_clip's own tower."""

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import HeadContext, build
from pipelines.heads.cocoop import NETWORK
from pipelines.methods import METHODS
from tests.small_clip import CLASS_NAMES, small_clip, toy_data

END, LR, DECAY = 49407, 0.05, 0.01


def objective(model, tokenizer, values, data):
    """Mean cross-entropy of every image under its own prompts, float64."""
    terms = []
    for feature, label in zip(data.features, data.labels, strict=True):
        z = torch.tensor(feature, dtype=torch.float64)
        hidden = (values["down"] @ z + values["down_bias"]).clamp(min=0)
        context = values["context"] + values["up"] @ hidden + values["up_bias"]
        logits = []
        for name in CLASS_NAMES:
            tokens = tokenizer([f"{name}."])[0]
            end = int((tokens == END).nonzero()[0]) + len(context)
            words = model.token_embedding(tokens)
            prompt = torch.cat((words[:1], context, words[1:]))[: len(tokens)]
            x = prompt + model.positional_embedding
            x = model.transformer(x[None], attn_mask=model.attn_mask.double())
            text = model.ln_final(x)[0, end] @ model.text_projection
            logits.append(10.0 * (z @ text) / text.norm())
        terms.append(torch.logsumexp(torch.stack(logits), 0) - logits[label])
    return torch.stack(terms).mean()


def test_one_update_is_the_one_by_hand():
    clip, data = small_clip(layers=1), toy_data(per_class=1)
    training = {"epochs": 1, "batch_size": 4, "lr": LR, "warmup_epochs": 0, "weight_decay": DECAY}
    head = {"name": "cocoop", "num_context": 2}
    config = METHODS["cocoop"].Config(head=head, training=training)
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    context = HeadContext(clip, CLASS_NAMES, data.templates, features, labels)
    start = dict(build(config.head, context, training_run.stream(0, "head")).named_parameters())
    start = {name: p.detach().double() for name, p in start.items()}
    found = train_in_process(TrainingJob(config, 0), data, clip).last.arrays

    model = small_clip(layers=1).model.double()
    generator = np.random.default_rng(0)
    for name in ("context", *NETWORK):
        change = torch.tensor(found[name]).double() - start[name]
        # Three random directions of each array: the derivative along them, by differences.
        for _ in range(3):
            way = F.normalize(
                torch.tensor(generator.normal(size=start[name].shape)).flatten(), dim=0
            )
            way = way.reshape(start[name].shape)
            ends = [
                objective(model, clip.tokenizer, {**start, name: start[name] + step * way}, data)
                for step in (1e-5, -1e-5)
            ]
            slope = float(ends[0] - ends[1]) / 2e-5
            expected = -LR * (slope + DECAY * float((start[name] * way).sum()))
            assert abs(float((change * way).sum()) - expected) < 1e-6 + 2e-3 * abs(expected), name
        assert change.abs().max() > 1e-5
