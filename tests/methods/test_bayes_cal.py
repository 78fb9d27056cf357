"""Bayes-CAL's terms, each by another way of computing it, and what one update does."""

import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from pipelines.finetune import state as training_run
from pipelines.finetune.loop import TrainingJob, train_in_process
from pipelines.heads import HeadContext, build
from pipelines.heads.bayes_cal import Config
from pipelines.heads.coop import Config as CoOpConfig
from pipelines.methods import METHODS
from pipelines.methods import bayes_cal as method
from pipelines.methods.base import Batch, Outputs
from tests.small_clip import CLASS_NAMES, small_clip, toy_data

LR, DECAY, SCALE = 0.05, 0.01, 10.0
HEAD = {"name": "bayes_cal", "num_context": 2, "init_std": 0.3, "prior_std": 0.5}


def context_of(clip, data, *, columns=True):
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    domains = {"domains": torch.tensor(data.columns["domains"])} if columns else {}
    return HeadContext(clip, CLASS_NAMES, data.templates, features, labels, domains)


def drawn():
    """Features, class and domain text features, labels and domains of nine images."""
    generator = torch.Generator().manual_seed(2)

    def rows(count):
        return F.normalize(torch.randn(count, 6, generator=generator).double(), dim=1)

    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    domains = torch.tensor([0, 2, 2, 0, 0, 2, 0, 0, 2])
    return rows(9), rows(4), rows(3), labels, domains


def test_the_gradients_are_those_of_the_cross_entropies_in_the_feature():
    features, text, *_, labels, _ = drawn()
    found = method.feature_gradient(features, SCALE * features @ text.T, text, labels)
    # Of an image feature of any length, as the encoder gives it.
    free = (2.5 * features).requires_grad_(True)
    logits = SCALE * F.normalize(free, dim=1) @ text.T
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), free)
    assert torch.allclose(found * SCALE / 2.5, expected, atol=1e-12)


def test_the_penalty_is_the_squared_slope_in_the_scale_of_the_logits():
    features, text, _, labels, domains = drawn()
    logits = SCALE * features @ text.T
    expected = 0.0
    for domain in (0, 2):
        own = domains == domain
        ends = [float(F.cross_entropy(s * logits[own], labels[own])) for s in (1 + 1e-6, 1 - 1e-6)]
        expected += ((ends[0] - ends[1]) / 2e-6) ** 2
    found = float(method.irm_penalty(logits, labels, domains))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found > 1e-3


def test_cosines_are_squared_and_a_gradient_that_vanishes_counts_nothing():
    first = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [1e-12, 0.0]]).double()
    second = torch.tensor([[3.0, 0.0], [0.0, -5.0], [7.0, 0.0], [1.0, 0.0]]).double()
    found = method.squared_cosines(first, second)
    assert found.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-5)


def test_the_divergence_is_that_of_the_gaussians():
    head = build(Config(**HEAD), context_of(small_clip(), toy_data(per_class=2)), 0)
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    for prompts in (head.classes, head.domains):
        start = prompts.mean.detach().clone()
        with torch.no_grad():
            prompts.mean.add_(torch.randn(start.shape, generator=generator))
            prompts.log_std.add_(torch.randn(start.shape, generator=generator))
        own = Normal(prompts.mean, prompts.log_std.exp())
        expected += float(kl_divergence(own, Normal(start, 0.5)).sum().detach())
    domains = {"domains": torch.zeros(8, dtype=torch.int64)}
    found = head.encode_batch(torch.eye(8, 16), domains).extra["kl"]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    features, text, domain_text, labels, domains = drawn()
    similarity = features @ text.T
    extra = {"kl": torch.tensor(7.0), "domain_text": domain_text}
    outputs = Outputs(
        similarity, SCALE * similarity, features, text, None, None, SCALE, extra=extra
    )
    weights = {"domain_weight": 0.1, "irm_weight": 0.2, "kl_weight": 0.4}
    config = method.Config(orthogonality_weight=0.3, **weights)
    outputs = dataclasses.replace(
        outputs, image_features=features.float(), text_features=text.float(),
        extra={"kl": extra["kl"], "domain_text": domain_text.float()},
    )  # fmt: skip
    losses, report = method.loss(outputs, Batch(labels, {"domains": domains}), config)
    domain_logits = SCALE * features @ domain_text.T
    log_domain = torch.log_softmax(domain_logits, dim=1)
    assert float(losses["domain"]) == pytest.approx(
        -0.1 * float(log_domain[range(9), domains].mean()), rel=1e-5
    )
    assert float(losses["kl"]) == pytest.approx(0.4 * 7.0)
    free = features.clone().requires_grad_(True)
    pairs = []
    for matrix, wanted in ((text, labels), (domain_text, domains)):
        entropy = F.cross_entropy(SCALE * F.normalize(free, dim=1) @ matrix.T, wanted)
        pairs.append(torch.autograd.grad(entropy, free)[0])
    cosines = F.cosine_similarity(*pairs, dim=1, eps=0)
    assert float(losses["orthogonality"]) == pytest.approx(
        0.3 * float(cosines.square().sum()), rel=2e-3
    )
    assert losses.keys() == {"cross_entropy", "kl", "domain", "irm", "orthogonality"}
    share = (domain_logits.argmax(dim=1) == domains).double().mean()
    assert report["domain_accuracy"] == pytest.approx(float(share))


class Watched:
    """Keeps the parameters after the epoch."""

    def load(self):
        return None

    def save(self, content):
        self.parameters = torch.load(io.BytesIO(content), weights_only=True)["parameters"]


def drawn_text(clip, names, mean, log_std, noise):
    """Unit text features of a drawn context, through open_clip's own transformer."""
    model, rows = clip.model, []
    for number, name in enumerate(names):
        context = mean + log_std.exp() * noise
        context = context if context.ndim == 2 else context[number]
        tokens = clip.tokenizer([f"{name}."])[0]
        end = int((tokens == 49407).nonzero()[0]) + len(context)
        words = model.token_embedding(tokens)
        prompt = torch.cat((words[:1], context, words[1:]))[: clip.context_length]
        x = model.transformer(
            (prompt + model.positional_embedding)[None], attn_mask=model.attn_mask
        )
        text = model.ln_final(x)[0, end] @ model.text_projection
        rows.append(text / text.norm())
    return torch.stack(rows)


def test_one_update_is_the_one_by_hand():
    clip, data = small_clip(), toy_data(per_class=2)
    weights = {"domain_weight": 0.5, "irm_weight": 0.7, "kl_weight": 0.01}
    training = {"epochs": 1, "batch_size": 8, "lr": LR, "warmup_epochs": 0, "weight_decay": DECAY}
    config = METHODS["bayes_cal"].Config(
        head=HEAD, training=training, orthogonality_weight=0.3, **weights
    )
    head = build(config.head, context_of(clip, data), training_run.stream(0, "head"))
    values = dict(head.named_parameters())
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch:
        # A draw that is known: every entry's noise is its place's sine.
        patch.setattr(torch, "randn_like", known_noise)
        history = train_in_process(TrainingJob(config, 0), data, clip, checkpoint=watched).history
    mean, log_std = values["classes.mean"], values["classes.log_std"]
    text = drawn_text(clip, CLASS_NAMES, mean, log_std, known_noise(mean))
    d_mean, d_log_std = values["domains.mean"], values["domains.log_std"]
    domain_text = drawn_text(clip, ("domain",) * 3, d_mean, d_log_std, known_noise(d_mean))
    loss = whole_loss(torch.tensor(data.features), text, domain_text, data)
    for m, s in ((mean, log_std), (d_mean, d_log_std)):
        loss = loss + 0.01 * kl_divergence(Normal(m, s.exp()), Normal(m.detach(), 0.5)).sum()
    loss.backward()
    assert history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in values.items():
        expected = -LR * (parameter.grad + DECAY * parameter.detach())
        change = watched.parameters[name] - parameter.detach()
        assert torch.allclose(change, expected, rtol=1e-3, atol=1e-6), name
        assert expected.abs().max() > 1e-4


def known_noise(like):
    return torch.arange(like.numel()).sin().reshape(like.shape)


def whole_loss(features, text, domain_text, data):
    """Everything but the divergence, with the gradients by autograd."""
    labels, domains = torch.tensor(data.labels), torch.tensor(data.columns["domains"])
    free = features.clone().requires_grad_(True)
    logits = SCALE * F.normalize(free, dim=1) @ text.T
    domain_logits = SCALE * F.normalize(free, dim=1) @ domain_text.T
    entropies = F.cross_entropy(logits, labels), F.cross_entropy(domain_logits, domains)
    gradients = [torch.autograd.grad(e, free, create_graph=True)[0] for e in entropies]
    cosines = F.cosine_similarity(*gradients, dim=1)
    penalty = 0
    for domain in (0, 1, 2):
        scale = torch.ones((), requires_grad=True)
        own = F.cross_entropy(logits[domains == domain] * scale, labels[domains == domain])
        penalty = penalty + torch.autograd.grad(own, scale, create_graph=True)[0] ** 2
    return entropies[0] + 0.5 * entropies[1] + 0.7 * penalty + 0.3 * (cosines**2).sum()


def test_judging_takes_the_mean_context_which_starts_as_coops():
    clip, data = small_clip(), toy_data(per_class=2)
    context = context_of(clip, data)
    head = build(Config(**HEAD), context, 3)
    plain = build(CoOpConfig(num_context=2), context, 3)
    assert torch.allclose(head.text_features(), plain.text_features(), atol=1e-6)
    features = torch.tensor(data.features)
    draws = [head.encode_batch(features, dict(context.columns)).similarity for _ in range(2)]
    assert float((draws[0] - draws[1]).detach().abs().max()) > 1e-3
    assert torch.equal(head(features), head(features))
    assert set(head.predictor().arrays) == {"text_features"}


@pytest.mark.parametrize("columns", [True, False])
def test_with_one_domain_the_domain_terms_are_left_out(columns):
    data = toy_data(per_class=2)
    data = dataclasses.replace(data, columns={"domains": np.zeros(8, dtype=np.int64)})
    head = build(Config(**HEAD), context_of(small_clip(), data, columns=columns), 0)
    assert {name for name, _ in head.named_parameters()} == {"classes.mean", "classes.log_std"}
    training = {"epochs": 1, "batch_size": 8, "lr": LR, "warmup_epochs": 0}
    config = METHODS["bayes_cal"].Config(head=HEAD, training=training)
    report = train_in_process(TrainingJob(config, 0), data, small_clip()).history[0]
    losses = {name for name in report if name.startswith("loss/")}
    assert losses == {"loss/cross_entropy", "loss/kl"}
