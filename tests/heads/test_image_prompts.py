"""Prompts that depend on the image: against CoOp, and against each image's own whole prompts."""

import numpy as np
import pytest
import torch

from pipelines.backbones.text_tower import encode_plain, encode_shared, text_tower
from pipelines.config import UserError
from pipelines.heads import HeadContext, build
from pipelines.heads.cocoop import Config
from pipelines.heads.coop import Config as CoOpConfig
from tests.small_clip import CLASS_NAMES, small_clip, toy_data

END = 49407


def built(clip, config, *, seed=3):
    data = toy_data(per_class=2)
    features, labels = torch.tensor(data.features), torch.tensor(data.labels)
    return build(config, HeadContext(clip, CLASS_NAMES, ("{}",), features, labels), seed), features


def by_hand(clip, head, image):
    """One image's similarities: its prompts, whole, through open_clip's own transformer."""
    model = clip.model
    hidden = (head.down @ image + head.down_bias).clamp(min=0)
    shift = head.up @ hidden + head.up_bias
    found = []
    for name in CLASS_NAMES:
        tokens = clip.tokenizer([f"{name}."])[0]
        end = int((tokens == END).nonzero()[0]) + len(head.context)
        words = model.token_embedding(tokens)
        prompt = torch.cat((words[:1], head.context + shift, words[1:]))[: clip.context_length]
        x = model.transformer(
            (prompt + model.positional_embedding)[None], attn_mask=model.attn_mask
        )
        text = model.ln_final(x)[0, end] @ model.text_projection
        found.append(image @ text / text.norm())
    return torch.stack(found)


@pytest.mark.parametrize("layers", [1, 3])
def test_each_image_is_judged_by_prompts_of_its_own(layers):
    clip = small_clip(layers=layers)
    head, features = built(clip, Config(num_context=3))
    towards = torch.randn(len(features), len(CLASS_NAMES), generator=torch.manual_seed(0))
    (head(features) * towards).sum().backward()
    expected = torch.stack([by_hand(clip, head, image) for image in features])
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    (expected * towards).sum().backward()
    assert float((head(features) - expected).detach().norm() / expected.detach().norm()) < 5e-6
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().max() > 1e-4
        error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(error) < 1e-5, name
    # The images matter: the same feature under another image's prompts has another similarity.
    text = head.image_text_features(features)
    assert float((text[0] - text[5]).detach().abs().max()) > 1e-2


def test_with_a_meta_net_of_zeros_it_is_coop():
    clip = small_clip()
    head, features = built(clip, Config(num_context=3))
    plain, _ = built(clip, CoOpConfig(num_context=3))
    assert torch.equal(head.context, plain.context)
    assert not torch.allclose(head(features), plain(features), atol=1e-3)
    with torch.no_grad():
        head.up.zero_()
        head.up_bias.zero_()
    assert torch.allclose(head(features), plain(features), atol=1e-6)


def prefixes_and_suffixes(tower, dtype):
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randn(5, 4, tower.width, generator=generator).to(dtype)
    suffixes = torch.randn(3, 6, tower.width, generator=generator).to(dtype)
    return prefixes, suffixes, torch.tensor([1, 3, 5])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize(
    "text", [{"layers": 1}, {"layers": 3}, {"layers": 2, "block_type": "custom", "qk_norm": True}]
)
def test_a_batch_of_prefixes_gives_what_whole_prompts_give(text, dtype, tolerance):
    tower = text_tower(small_clip(**text).model.to(dtype))
    prefixes, suffixes, ends = prefixes_and_suffixes(tower, dtype)
    prefixes.requires_grad_(True)
    found = encode_shared(tower, prefixes, suffixes, ends)
    joined = torch.cat([torch.cat((p.expand(3, -1, -1), suffixes), dim=1) for p in prefixes])
    expected = encode_plain(tower, joined, ends.repeat(5) + 4).reshape(5, 3, -1)
    assert found.dtype == dtype
    error = (found - expected).detach().norm() / expected.detach().norm()
    assert float(error) < tolerance
    towards = torch.randn(found.shape, generator=torch.manual_seed(1)).to(dtype)
    ours, theirs = (
        torch.autograd.grad((x * towards).sum(), prefixes, retain_graph=True)[0]
        for x in (found, expected)
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 10 * tolerance


def test_little_memory_cuts_the_images_to_chunks_and_changes_no_gradient():
    clip = small_clip(layers=3)
    results = []
    for allowed in (4.0, 4e-4, 1e-9):
        head, features = built(clip, Config(num_context=3, max_activation_memory=allowed))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            similarity = head(features)
        similarity.square().cumsum(dim=1).sum().backward()
        images = head._images_at_once(4)
        results.append((head.context.grad, sum(kept), images))
    (whole, whole_size, all_images), (chunked, chunk_size, few), (single, _, one) = results
    assert all_images >= len(features) > few > 1 == one
    assert chunk_size < 0.2 * whole_size
    for gradient in (chunked, single):
        assert float((gradient - whole).norm() / whole.norm()) < 1e-5


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    head, features = built(small_clip(), Config(num_context=3, max_activation_memory=1e-9))
    with_graph = head(features)
    with torch.no_grad():
        without = head(features)
    assert without.grad_fn is None
    assert torch.allclose(without, with_graph, atol=1e-6)


@pytest.mark.parametrize("text", [{}, {"ls_init_value": 0.3}])
def test_the_predictor_needs_nothing_but_itself(text):
    clip = small_clip(**text)
    head, features = built(clip, Config(num_context=3))
    predictor = head.predictor()
    expected = head(features).detach().numpy()
    for parameter in clip.model.parameters():
        parameter.data.zero_()
    assert np.abs(predictor.similarity(features.numpy()) - expected).max() < 2e-6
    # Class tokens and positions alone, not the vocabulary.
    assert sum(array.size for array in predictor.arrays.values()) < 60_000


def test_a_tower_that_the_head_could_not_carry_is_refused():
    with pytest.raises(UserError, match=r"unusual kind.*choose head=coop"):
        built(small_clip(layers=2, block_type="custom", qk_norm=True), Config(num_context=3))


def test_no_images_give_no_rows():
    head, features = built(small_clip(), Config(num_context=3))
    assert head(features[:0]).shape == (0, len(CLASS_NAMES))
