"""DPLCLIP: prompts by the mean of each domain's images, by hand; judging by one fixed mean."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.config import UserError
from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import HeadContext, build
from pipelines.heads.dplclip import Config
from pipelines.methods import METHODS
from tests.small_clip import CLASS_NAMES, small_clip, toy_data

END, LR, DECAY = 49407, 0.05, 0.01


def context_of(clip, data):
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    return HeadContext(clip, CLASS_NAMES, data.templates, features, labels)


def by_hand(clip, head, mean):
    """Text features (K, D) of the prompts of one mean, through open_clip's own transformer."""
    model, hidden = clip.model, mean
    for number in (0, 1):
        layer = head.layers[number]
        hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
    out = head.layers[2].weight @ hidden + head.layers[2].bias
    context = out.reshape(-1, model.token_embedding.embedding_dim)
    rows = []
    for name in CLASS_NAMES:
        tokens = clip.tokenizer([f"{name}."])[0]
        end = int((tokens == END).nonzero()[0]) + len(context)
        words = model.token_embedding(tokens)
        prompt = torch.cat((words[:1], context, words[1:]))[: clip.context_length]
        x = model.transformer(
            (prompt + model.positional_embedding)[None], attn_mask=model.attn_mask
        )
        text = model.ln_final(x)[0, end] @ model.text_projection
        rows.append(text / text.norm())
    return torch.stack(rows)


def batch_similarity(clip, head, features, domains):
    """Each image beside the prompts of the mean of its domain's images."""
    rows = []
    for feature, domain in zip(features, domains, strict=True):
        own = [f for f, d in zip(features, domains, strict=True) if d == domain]
        rows.append(by_hand(clip, head, sum(own) / len(own)) @ feature)
    return torch.stack(rows)


def test_one_update_is_the_one_by_hand():
    clip, data = small_clip(), toy_data(per_class=2)
    data = dataclasses.replace(data, columns={"domains": np.array([0, 2, 0, 0, 2, 0, 0, 2])})
    training = {"epochs": 1, "batch_size": 8, "lr": LR, "warmup_epochs": 0, "weight_decay": DECAY}
    settings = {"name": "dplclip", "num_context": 2, "width": 6, "dropout": 0.0}
    config = METHODS["dplclip"].Config(head=settings, training=training)
    head = build(config.head, context_of(clip, data), training_run.stream(0, "head"))
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    similarity = batch_similarity(clip, head, features, data.columns["domains"].tolist())
    loss = -torch.log_softmax(10.0 * similarity, dim=1)[range(8), labels].mean()
    loss.backward()
    trained = {}

    def watch(run):
        trained.update({n: p.detach().clone() for n, p in run.parameters.items()})
        return finish(run)

    finish = training_run.predictor_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "predictor_of", watch)
        history = train_in_process(TrainingJob(config, 0), data, clip).history
    assert history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in head.named_parameters():
        expected = -LR * (parameter.grad + DECAY * parameter.detach())
        assert torch.allclose(trained[name] - parameter.detach(), expected, rtol=1e-3, atol=2e-6)
        assert expected.abs().max() > 1e-6


def test_it_judges_by_the_mean_of_the_training_features():
    clip, data = small_clip(), toy_data(per_class=3)
    head = build(Config(num_context=2, width=6), context_of(clip, data), 0)
    text = by_hand(clip, head, torch.tensor(data.features).mean(dim=0)).detach().numpy()
    predictor = head.predictor()
    assert np.abs(predictor.arrays["text_features"] - text).max() < 2e-6
    found = predictor.similarity(data.validation_features)
    assert np.abs(found - data.validation_features @ text.T).max() < 2e-6
    # Neighbours change nothing, and dropout neither.
    alone = head(torch.tensor(data.validation_features[:1])).detach()
    assert np.abs(alone.numpy() - found[:1]).max() < 2e-6


def test_outliers_of_a_step_are_judged_by_the_mean_of_its_images():
    clip, data = small_clip(), toy_data(per_class=2)
    head = build(Config(num_context=2, width=6, dropout=0.0), context_of(clip, data), 0)
    images, outliers = torch.tensor(data.features), torch.tensor(data.outliers)
    domains = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1])
    found = head.encode_batch(torch.cat((images, outliers)), {"domains": domains}).similarity
    expected = outliers @ by_hand(clip, head, images.mean(dim=0)).T
    assert torch.allclose(found[8:], expected, atol=2e-6)
    assert torch.allclose(
        found[:8], batch_similarity(clip, head, images, domains.tolist()), atol=2e-6
    )


def test_dropout_is_drawn_anew_in_training_alone():
    clip, data = small_clip(), toy_data(per_class=2)
    head = build(Config(num_context=2, dropout=0.5), context_of(clip, data), 0)
    features, domains = torch.tensor(data.features), torch.zeros(8, dtype=torch.int64)
    drawn = [head.encode_batch(features, {"domains": domains}).similarity for _ in range(2)]
    assert float((drawn[0] - drawn[1]).detach().abs().max()) > 1e-4
    assert torch.equal(head(features), head(features))
    hidden = F.relu(head.layers[0](features.mean(dim=0)))
    assert hidden.shape == (512,)


def test_without_domains_it_says_what_is_missing():
    data = dataclasses.replace(toy_data(), columns={})
    config = METHODS["dplclip"].Config(head={"name": "dplclip", "num_context": 2})
    with pytest.raises(UserError, match="reads domains of the training images"):
        train_in_process(TrainingJob(config, 0), data, small_clip())
