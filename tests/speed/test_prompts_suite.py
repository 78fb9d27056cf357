"""The two steps that are compared do the same work."""

import pytest
import torch

from pipelines import speed
from pipelines.config import UserError
from pipelines.heads import HeadContext, build
from pipelines.heads.coop import Config
from pipelines.speed.prompts import _plain_encoder, class_names
from tests.small_clip import small_clip


def test_the_plain_step_gives_the_features_and_gradient_of_the_shared_one():
    clip, names = small_clip(layers=3), class_names(7)
    context = HeadContext(clip, names, ("{}",), torch.zeros(7, 16), torch.arange(7))
    head = build(Config(num_context=6), context, seed=0)
    results = []
    for encode in (head.text_features, _plain_encoder(head, clip, names)):
        head.zero_grad()
        features = encode()
        features.cumsum(dim=1).square().sum().backward()
        results.append((features.detach(), head.context.grad.clone()))
    for shared, plain in zip(*results, strict=True):
        assert float((shared - plain).norm() / plain.norm()) < 1e-5


def test_names_have_one_to_three_tokens_in_equal_shares():
    tokens = small_clip().tokenizer(list(class_names(9)))
    lengths = ((tokens > 0).sum(dim=1) - 2).tolist()
    assert sorted(lengths) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_an_unknown_part_of_the_suite_is_refused_with_the_parts_there_are():
    with pytest.raises(UserError, match="only=steps: no such part; allowed: step, images, many"):
        speed.run("prompts", only="steps")
