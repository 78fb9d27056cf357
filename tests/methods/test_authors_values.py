"""Methods on a frozen model against what their authors' own functions compute on fixed inputs.

`authors_values.json` comes from one run of the public code in float64, outside the repository, on
CPU and with `waves` for every input, so that anybody can make the values again:

    negprompt_*    github mala-lab/NegPrompt, d4569a99: core/train_clip.py, train_nega_clip in stage
                   3 with its weights (and each weight alone), one step of SGD at 0.1, from a
                   network that gives the text features; core/test_clip.py, get_ood_score (msp)
    locoop_*       github AtsuMiyai/LoCoOp, a311b391: trainers/locoop.py, entropy_select_topk
    gallop_*       github MarcLafon/gallop, f75999e1: GalLoP.forward with given features, then
                   GlobalLocalLoss with topk [2, 3], its draw of a prompt for each image given
    croft_*, bayes_cal_*, coop_*, cocoop_*, dplclip_*, clip_adapter_*, tip_*
                   github LinLLLL/CRoFT, e16d0e13: CoOp/trainers: CustomCLIP of each, CRoFT's
                   feature_perturbation and EDR with lambda2 = 0, BCAL.forward_backward with its KL
                   at 0, TIP_ADAPTER.forward_backward, DPLCLIP's MLP before CoOp's TextEncoder
    fa_*           github 0xFAFA/FA, 9cf7f88c: model.py, CustomCLIP with K = 1 and 3 and given
                   features, its context moved by `waves`; the scores by the lines of main.py's
                   test, which divides logits by 100, CLIP's scale (here 10); its layer norm in
                   float64 and GELU for QuickGELU, as the small tower here has them
    liu_*          github wetliu/energy_ood, 77f3c09b: CIFAR/train.py, train
    balanced_*     github hyunjunChhoi/Balanced_Energy, 62260c7f: classification/inf_train_res.py,
                   train and influence

Gradients are those of the loss in the named array. Ours are computed in float32, as in training.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.heads import HEADS, HeadContext, build
from pipelines.heads.gallop import GalLoP
from pipelines.methods import METHODS
from pipelines.methods.base import Batch, Outputs
from pipelines.methods.croft import inner_loss
from pipelines.ood import balanced_energy_margin, energy_margin
from pipelines.ood.scores import neg_mcm
from pipelines.score.judge import judge
from tests.small_clip import CLASS_NAMES, small_clip

VALUES = json.loads(Path(__file__).with_name("authors_values.json").read_text())
SCALE = 4.0
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def waves(*shape, start):
    """Numbers in [-2, 2] that no generator of random numbers decides."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (2 * torch.sin(start + 1.7 * steps + 0.31 * steps**2)).reshape(shape).float()


def unit(*shape, start):
    return F.normalize(waves(*shape, start=start), dim=-1)


IMAGES, TEXT = unit(7, 4, start=0.3), unit(3, 4, start=1.1)


def same(found, name, rtol=2e-5):
    expected = np.array(VALUES[name])
    found = np.asarray(found.detach() if isinstance(found, torch.Tensor) else found)
    atol = rtol * np.abs(expected).max() / 10
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=rtol, atol=atol)


def outputs(similarity, images=IMAGES, text=TEXT, **given):
    return Outputs(
        similarity=similarity,
        logits=similarity * SCALE,
        image_features=images,
        text_features=text,
        outlier_similarity=None,
        outlier_logits=None,
        logit_scale=SCALE,
        **given,
    )


# NegPrompt


def negprompt(raw, **settings):
    negatives = F.normalize(raw, dim=-1)
    config = METHODS["negprompt"].Config(objective="published", **settings)
    given = outputs(IMAGES @ TEXT.T, extra={"negatives": negatives})
    return METHODS["negprompt"].loss(given, Batch(labels=LABELS), config)


def test_the_published_negprompts_terms_and_its_step():
    raw = waves(3, 2, 4, start=2.3).requires_grad_()
    losses, report = negprompt(raw)
    # Their second and third term are 1 less. Cross-entropy moves no negative prompt.
    same(report["negative/images"], "negprompt_images")
    same(report["negative/classes"] - 1, "negprompt_classes")
    same(report["negative/spread"] - 1, "negprompt_spread")
    taught = sum(value for name, value in losses.items() if name != "cross_entropy")
    same(taught - 0.1 - 0.05, "negprompt_loss")
    sum(losses.values()).backward()
    same(-0.1 * raw.grad, "negprompt_moved")


def test_negprompts_score_is_mcm_of_all_prompts():
    negatives = F.normalize(waves(3, 2, 4, start=2.3), dim=-1).flatten(0, 1)
    same(neg_mcm(IMAGES @ TEXT.T, IMAGES @ negatives.T), "negprompt_score")


# CRoFT


def croft(*, image_adapter=None, text_adapter=None, generator=None):
    config = METHODS["croft"].Config()
    head = HEADS["croft"].build(
        config.head, HeadContext(Zero(), ("a", "b", "c"), ("{}",), IMAGES, LABELS), 0
    )
    for name, value in (
        ("image_adapter", image_adapter),
        ("text_adapter", text_adapter),
        ("generator", generator),
    ):
        if value is not None:
            getattr(head, name).data.copy_(value)
    return head, head.encode(IMAGES)


class Zero:
    """A backbone whose text features are known."""

    embed_dim, logit_scale, name, device = 4, SCALE, "known", torch.device("cpu")
    model, tokenizer = torch.nn.Linear(1, 1), None

    def encode_text(self, texts):
        return TEXT[: len(texts)]


def test_crofts_adapters():
    _, encoded = croft(image_adapter=waves(4, 4, start=0.7), text_adapter=waves(4, 4, start=1.9))
    same(encoded.similarity * SCALE, "croft_logits")


@pytest.mark.parametrize(
    ("name", "sign"),
    [("croft_inner", None), ("croft_outer_minus", -1), ("croft_outer_vlcs", 0)],
)
def test_crofts_generator_in_both_updates(name, sign):
    # With adapters at the identity: there the public code's two places of them are one.
    head, encoded = croft(generator=waves(4, 4, start=2.9))
    settings = {} if sign is None else {"push_sign": sign}
    config = METHODS["croft"].Config(gradient_weight=0.0, **settings)
    given = outputs(encoded.similarity, extra=encoded.extra, rows=encoded.rows)
    batch = Batch(labels=LABELS)
    if sign is None:
        losses, _ = inner_loss(given, batch, config)
    else:
        losses, _ = METHODS["croft"].loss(given, batch, config)
    same(losses["covariate"], name)
    losses["covariate"].backward()
    same(head.generator.grad, f"{name}_gradient")


# LoCoOp and GalLoP


def test_locoops_entropy():
    text = unit(6, 4, start=1.3).requires_grad_()
    labels = torch.tensor([0, 5, 2, 3, 1, 4, 0])
    batch = Batch(labels=labels, columns={"local_features": unit(7, 5, 4, start=0.9)})
    config = METHODS["locoop"].Config(weight=1.0, top_share=2 / 6)
    losses, report = METHODS["locoop"].loss(outputs(IMAGES @ text.T, text=text), batch, config)
    assert 0.1 < report["patches_without_class"] < 0.9
    # Theirs takes the logarithm of p + 1e-5.
    same(-losses["entropy"], "locoop_entropy", rtol=1e-4)
    losses["entropy"].backward()
    same(-text.grad, "locoop_gradient", rtol=1e-4)


class Known(torch.nn.Module):
    """A prompt whose text features are known."""

    logit_scale, class_names = SCALE, ("a", "b", "c")

    def __init__(self, features):
        super().__init__()
        self.features = features

    def text_features(self):
        return self.features


def test_gallops_losses(monkeypatch):
    prompts = [Known(part) for part in unit(4, 3, 4, start=0.2)]
    local = [Known(part) for part in unit(2, 3, 4, start=0.8)]
    head = GalLoP(prompts, local, waves(4, 4, start=2.1), [0.4, 0.6])  # 2 and 3 of 5
    encoded = head.encode(IMAGES, unit(7, 5, 4, start=0.9))
    drawn = torch.tensor([2, 0, 3, 1, 1, 2, 0])
    monkeypatch.setattr(torch, "rand", lambda _: 1.0 - F.one_hot(drawn, 4))
    given = outputs(encoded.similarity, text=encoded.text_features, rows=encoded.rows)
    config = METHODS["gallop"].Config()
    losses, _ = METHODS["gallop"].loss(given, Batch(labels=LABELS), config)
    same(losses["cross_entropy"], "gallop_global")
    same(losses["local"], "gallop_local")
    same(sum(losses.values()), "gallop_loss")


# Bayes-CAL


def bayes_cal(domain, irm, orthogonality):
    text, domain_text = TEXT.clone().requires_grad_(), unit(2, 4, start=2.6).requires_grad_()
    extra = {"kl": torch.zeros(()), "domain_text": domain_text}
    config = METHODS["bayes_cal"].Config(
        domain_weight=domain, irm_weight=irm, orthogonality_weight=orthogonality
    )
    batch = Batch(labels=LABELS, columns={"domains": torch.tensor([0, 1, 0, 1, 1, 0, 1])})
    given = outputs(IMAGES @ text.T, text=text, extra=extra)
    losses, _ = METHODS["bayes_cal"].loss(given, batch, config)
    return losses, text, domain_text


def test_bayes_cals_terms():
    losses, *_ = bayes_cal(0.3, 0.5, 0.2)
    same(sum(losses.values()), "bayes_cal_loss")
    same(losses["orthogonality"] / 0.2, "bayes_cal_orthogonality")
    # Theirs has no gradient of the orthogonality.
    losses, text, domain_text = bayes_cal(0.3, 0.5, 0.0)
    sum(losses.values()).backward()
    same(text.grad, "bayes_cal_text_gradient")
    same(domain_text.grad, "bayes_cal_domain_gradient")


# Energies of images and outliers


def logits():
    rows = waves(5, 4, start=0.3), waves(6, 4, start=1.1)
    return [part.double().requires_grad_() for part in rows], torch.tensor([0, 3, 1, 2, 0])


def test_lius_energies():
    (images, outliers), labels = logits()
    hinges = energy_margin(images, outliers, m_in=-2.4, m_out=-1.1)
    loss = F.cross_entropy(images, labels) + 0.1 * hinges
    same(loss, "liu_loss")
    loss.backward()
    same(images.grad, "liu_in_gradient")
    same(outliers.grad, "liu_out_gradient")


@pytest.mark.parametrize(("gamma", "alpha"), [(0.75, 4.0), (2.0, 1.5)])
def test_chois_balanced_energies(gamma, alpha):
    (images, outliers), labels = logits()
    prior = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    hinges = balanced_energy_margin(images, outliers, prior, -2.4, -1.1, alpha, gamma)
    loss = F.cross_entropy(images, labels) + 0.1 * hinges
    same(loss, f"balanced_{gamma}_{alpha}_loss")
    loss.backward()
    same(outliers.grad, f"balanced_{gamma}_{alpha}_out_gradient")


# Adapters


def test_clip_adapters_logits():
    down, up = waves(2, 4, start=0.6), waves(4, 2, start=1.4)
    head = HEADS["clip_adapter"].build(
        HEADS["clip_adapter"].Config(reduction=2),
        HeadContext(Zero(), ("a", "b", "c"), ("{}",), IMAGES, LABELS),
        0,
    )
    head.down.data.copy_(down)
    head.up.data.copy_(up)
    same(head(IMAGES) * SCALE, "clip_adapter_logits")


def test_tip_adapters_logits_and_the_gradient_of_its_keys():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])

    class Hundred(Zero):
        logit_scale = 100.0

    context = HeadContext(Hundred(), ("a", "b", "c"), ("{}",), unit(9, 4, start=1.6), labels)
    plugin = HEADS["tip_adapter_f"]
    head = plugin.build(plugin.Config(alpha=1.3, beta=5.5), context, 0)
    found = head(IMAGES) * 100
    same(found, "tip_logits")
    loss = F.cross_entropy(found, LABELS)
    same(loss, "tip_loss")
    loss.backward()
    same(head.keys.grad, "tip_keys_gradient")


# Prompts before a text tower whose every number is a sine


def tower_of_sines():
    """The small CLIP with 0.3 sin(n + 1.7 i + 0.31 i^2), i counted modulo 997, in its n-th array.

    Of the text tower, in the order of their names; around 1 in a layer norm's weight.
    """
    clip = small_clip()
    arrays = sorted(clip.model.named_parameters())
    arrays = [(n, p) for n, p in arrays if p.ndim and not n.startswith("visual.")]
    for number, (name, array) in enumerate(arrays):
        steps = torch.arange(array.numel(), dtype=torch.float64) % 997
        sines = torch.sin(number + 1.7 * steps + 0.31 * steps**2).reshape(array.shape)
        is_norm = "ln_" in name and name.endswith("weight")
        array.copy_(float(is_norm) + 0.3 * sines)
    return clip


def on_the_tower(config):
    images = unit(5, 16, start=0.3)
    context = HeadContext(tower_of_sines(), CLASS_NAMES, ("{}",), images, torch.arange(5) % 4)
    return build(config, context, 0), images


@pytest.mark.parametrize("name", ["coop", "cocoop"])
def test_learned_prompts(name):
    head, images = on_the_tower(HEADS[name].Config(num_context=2))
    given = {"context": 0.5 * waves(2, 32, start=0.8)}
    if name == "cocoop":
        given |= {
            "down": waves(1, 16, start=0.4),
            "down_bias": torch.tensor([3.0]),
            "up": 0.2 * waves(32, 1, start=1.2),
            "up_bias": 0.1 * waves(32, start=2.2),
        }
    for key, value in given.items():
        getattr(head, key).data.copy_(value)
    logits = head(images) * 10
    same(logits, f"{name}_logits")
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 0])).backward()
    same(head.context.grad, f"{name}_context_gradient", rtol=2e-4)
    if name == "cocoop":
        same(head.down.grad, "cocoop_down_gradient", rtol=2e-4)


@pytest.mark.parametrize("coefficient", [1, 3])
def test_fas_prompts_its_loss_and_its_scores(coefficient):
    config = METHODS["fa"].Config(head={"name": "fa", "coefficient": coefficient})
    head, images = on_the_tower(config.head)
    head.forced.context.data.add_(0.5 * waves(4, 32, start=0.8))
    encoded = head.encode(images)
    given = outputs(encoded.similarity, images=images, rows=encoded.rows)
    given = replace(given, logits=encoded.similarity * 10, logit_scale=10.0)
    losses, _ = METHODS["fa"].loss(given, Batch(labels=torch.tensor([0, 1, 2, 3, 0])), config)
    same(losses["cross_entropy"], f"fa_{coefficient}_loss")
    losses["cross_entropy"].backward()
    same(head.forced.context.grad, f"fa_{coefficient}_context_gradient", rtol=2e-4)
    predictor, local = head.predictor(), unit(5, 3, 16, start=0.9).numpy()
    same(predictor.similarity(images.numpy()) * 10, f"fa_{coefficient}_logits")
    judged = judge(predictor, {"mcm": {}, "gl_mcm": {}}, images.numpy(), local=local)
    same(judged["score_mcm"], f"fa_{coefficient}_mcm", rtol=2e-6)
    same(judged["score_gl_mcm"], f"fa_{coefficient}_gl_mcm", rtol=2e-6)


def test_dplclips_prompts_of_a_mean_feature():
    head, images = on_the_tower(HEADS["dplclip"].Config(num_context=2, width=6))
    for number, layer in enumerate(head.layers):
        layer.weight.data.copy_(0.4 * waves(*layer.weight.shape, start=number + 0.5))
        layer.bias.data.copy_(0.3 * waves(*layer.bias.shape, start=number + 1.5))
    same(head.prompt_features(images.mean(dim=0)[None])[0], "dplclip_text", rtol=1e-4)
