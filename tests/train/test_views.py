"""Augmented views of training images: what is encoded, and that nothing else decides it."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.backbones.encoder import Encoder
from pipelines.data.augmentation import Augmentation
from pipelines.train.augment import augment
from pipelines.train.views import Views

CROP = Augmentation(crop="resized_crop", flip=True)


def corner_and_mean(pixels: Tensor) -> Tensor:
    """A feature (N, 6) of float pixels (N, 3, H, W) that every crop and flip changes."""
    return torch.cat([pixels[:, :, 0, 0], pixels.mean(dim=(2, 3))], dim=1)


TOWER: Any = SimpleNamespace(
    embed_dim=6,
    device=torch.device("cpu"),
    normalize=lambda pixels: pixels.permute(0, 3, 1, 2).double() / 255,
    encode_image=corner_and_mean,
)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8))


def features(images: list[np.ndarray], how: Views, size: int) -> np.ndarray:
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    return Encoder(TOWER, size, pixel_pass=how).encode(batches).columns["feature"]


def test_views_stand_side_by_side_and_are_those_of_the_augmentation(
    images: list[np.ndarray],
) -> None:
    found = features(images, Views(3, CROP), 6).reshape(6, 3, 6)
    for place, image in enumerate(images):
        number = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
        for view in range(3):
            pixels = torch.from_numpy(image[None])
            ids = np.array([number], np.uint64)
            seen = augment(pixels, ids, CROP, seed=0, epoch=0, view=view)[0].numpy() / 255
            np.testing.assert_allclose(found[place, view, :3], seen[0, 0])
            np.testing.assert_allclose(found[place, view, 3:], seen.mean(axis=(0, 1)))
    assert len(np.unique(found.reshape(18, 6).round(9), axis=0)) == 18  # each one is another


def test_a_view_does_not_depend_on_the_batch_or_the_number_of_views(
    images: list[np.ndarray],
) -> None:
    all_at_once = features(images, Views(3, CROP), 6)
    assert np.array_equal(features(images[::-1], Views(3, CROP), 4)[::-1], all_at_once)
    assert np.array_equal(features(images, Views(2, CROP), 5), all_at_once[:, :12])


def test_without_augmentation_every_view_is_the_image(images: list[np.ndarray]) -> None:
    found = features(images, Views(2, Augmentation()), 6)
    pixels = np.stack(images) / 255
    expected = np.concatenate([pixels[:, 0, 0], pixels.mean(axis=(1, 2))], axis=1)
    np.testing.assert_allclose(found, np.concatenate([expected, expected], axis=1))


def test_the_address_knows_number_and_augmentation() -> None:
    identities = [
        Views(count, how).identity() for count in (1, 2) for how in (CROP, Augmentation(flip=True))
    ]
    assert len({identity.model_dump_json() for identity in identities}) == 4
