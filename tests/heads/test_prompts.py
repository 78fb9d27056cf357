"""Learned prompts against open_clip's own text tower on the whole context length."""

import pytest
import torch
import torch.nn.functional as F

from pipelines.backbones.text_tower import encode_plain, encode_shared, text_tower
from pipelines.config import UserError
from pipelines.heads import HeadContext, build
from pipelines.heads.coop import Config
from tests.small_clip import CLASS_NAMES, small_clip

END = 49407


def oracle_features(clip, context, position):
    """Text features by open_clip's own forward on all tokens, the context put in by hand."""
    model, num_context = clip.model, context.shape[-2]
    rows = []
    for number, name in enumerate(CLASS_NAMES):
        tokens = clip.tokenizer([f"{name}."])[0]
        end = int((tokens == END).nonzero()[0])
        words = model.token_embedding(tokens)
        own = context if context.ndim == 2 else context[number]
        before = {"end": num_context, "middle": num_context // 2, "front": 0}[position]
        prompt = torch.cat(
            (words[:1], own[:before], words[1 : end - 1], own[before:], words[end - 1 :])
        )[: clip.context_length]
        x = prompt[None] + model.positional_embedding
        x = model.transformer(x, attn_mask=model.attn_mask)
        x = model.ln_final(x)[0, end + num_context] @ model.text_projection
        rows.append(F.normalize(x, dim=0))
    return torch.stack(rows)


def context_of(clip):
    features = torch.zeros(8, clip.embed_dim)
    labels = torch.arange(8) % len(CLASS_NAMES)
    return HeadContext(clip, CLASS_NAMES, ("a photo of a {}.",), features, labels)


def relative(difference, reference):
    return float(difference.detach().norm() / reference.detach().norm())


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_features_and_gradients_equal_the_whole_tower(position, class_specific, layers):
    clip = small_clip(layers=layers)
    config = Config(num_context=5, position=position, class_specific=class_specific)
    head = build(config, context_of(clip), seed=3)
    towards = torch.randn(len(CLASS_NAMES), clip.embed_dim, generator=torch.manual_seed(0))
    features = head.text_features()
    (features * towards).sum().backward()

    context = head.context.detach().clone().requires_grad_(True)
    expected = oracle_features(clip, context, position)
    (expected * towards).sum().backward()
    assert relative(features - expected, expected) < 5e-6
    assert relative(head.context.grad - context.grad, context.grad) < 1e-5
    # The comparison means something only where the context matters.
    assert context.grad.abs().max() > 1e-3


def test_towers_with_layer_scale_and_quick_gelu_are_followed():
    clip = small_clip(layers=2, ls_init_value=0.3)
    head = build(Config(num_context=4), context_of(clip), seed=1)
    context = head.context.detach().clone().requires_grad_(True)
    expected = oracle_features(clip, context, "end")
    assert relative(head.text_features() - expected, expected) < 5e-6


def test_a_block_of_another_kind_takes_the_plain_path_and_agrees():
    clip = small_clip(layers=2, block_type="custom", qk_norm=True)
    head = build(Config(num_context=4), context_of(clip), seed=1)
    context = head.context.detach().clone().requires_grad_(True)
    expected = oracle_features(clip, context, "end")
    assert relative(head.text_features() - expected, expected) < 5e-6


def test_padding_after_the_end_of_text_changes_nothing():
    tower = text_tower(small_clip().model)
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(4, tower.width, generator=generator)
    suffixes = torch.randn(3, 6, tower.width, generator=generator)
    ends = torch.tensor([1, 3, 5])
    together = encode_shared(tower, prefix, suffixes, ends)
    for number, end in enumerate(ends):
        cut = suffixes[number : number + 1, : end + 1]
        prompt = torch.cat((prefix[None], cut), dim=1)
        alone = encode_plain(tower, prompt, torch.tensor([4 + end]))
        assert relative(together[number] - alone[0], alone[0]) < 5e-6


def test_zero_context_gradient_reaches_no_weight_of_the_backbone():
    clip = small_clip()
    head = build(Config(num_context=4), context_of(clip), seed=0)
    head.text_features().sum().backward()
    assert [name for name, _ in head.named_parameters()] == ["context"]
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_a_phrase_starts_from_its_own_prompt():
    clip = small_clip()
    head = build(Config(init_phrase="a photo of a"), context_of(clip), seed=0)
    texts = [f"a photo of a {name}." for name in CLASS_NAMES]
    expected = clip.encode_text(texts)
    assert relative(head.text_features() - expected, expected) < 5e-6


def test_contexts_are_normal_and_follow_the_seed():
    clip = small_clip(length=77)
    first = build(Config(num_context=64), context_of(clip), seed=0).context.detach()
    again = build(Config(num_context=64), context_of(clip), seed=0).context.detach()
    other = build(Config(num_context=64), context_of(clip), seed=1).context.detach()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)


def test_a_prompt_longer_than_the_tower_is_refused_with_the_allowed_length():
    clip = small_clip(length=24)
    with pytest.raises(UserError, match=r"num_context=30.*takes 24; at most 18"):
        build(Config(num_context=30), context_of(clip), seed=0)
    head = build(Config(num_context=18), context_of(clip), seed=0)
    assert head.text_features().shape == (len(CLASS_NAMES), clip.embed_dim)


def test_a_tower_that_is_not_causal_is_refused():
    clip = small_clip()
    clip.model.attn_mask = None
    with pytest.raises(UserError, match="without a causal mask"):
        text_tower(clip.model)


@pytest.mark.parametrize("position", ["end", "front"])
def test_recomputed_activations_give_the_same_gradient_to_the_last_bit(position):
    clip = small_clip(layers=3)
    gradients = []
    for allowed in (4.0, 1e-9):
        config = Config(num_context=4, position=position, max_activation_memory=allowed)
        head = build(config, context_of(clip), seed=1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            features = head.text_features()
        features.square().cumsum(dim=1).sum().backward()
        gradients.append((head.context.grad, sum(kept)))
    (kept_gradient, kept_size), (again_gradient, again_size) = gradients
    assert torch.equal(kept_gradient, again_gradient)
    assert again_size < 0.5 * kept_size
