"""Augmentation: the same bytes wherever it is computed, and torchvision's formulas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as torchvision

from pipelines.train import colours
from pipelines.train.augment import Augmentation, Jitter, augment, boxes, flips, offsets, uniforms
from pipelines.train.draws import GAMMA, Draws, Purpose, mix

JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8)
SIMCLR = Augmentation(crop="resized_crop", size=24, flip=True, jitter=JITTER, grey=0.2)
CIFAR = Augmentation(crop="pad_crop", flip=True)
EACH = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "cifar": CIFAR,
    "resized": Augmentation(crop="resized_crop"),
    "jitter": Augmentation(jitter=JITTER),
    "simclr": SIMCLR,
}
# Computed with Python's own integers from the description in `pipelines.train.draws`.
RECORDED = [
    [0.2738777948643837, 0.8237600862555777],
    [0.7922115378999268, 0.30777522548356573],
    [0.9861599375796113, 0.15051601584731256],
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(number: int, high: int = 32, wide: int = 32) -> Tensor:
    """Smooth and noisy images: every grey level, every hue."""
    random = np.random.default_rng(3)
    coarse = torch.from_numpy(random.integers(0, 256, (number, 3, 4, 4)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (high, wide), mode="bicubic")
    noise = torch.from_numpy(random.normal(0, 4, (number, 3, high, wide)).astype(np.float32))
    pixels = (smooth + noise).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def some_ids(number: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 2**64, number, np.uint64)


def planes(pixels: Tensor) -> np.ndarray:
    return np.ascontiguousarray(pixels.permute(0, 3, 1, 2).numpy())


def far(one: np.ndarray | Tensor, other: np.ndarray | Tensor) -> int:
    """The largest distance in grey levels."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


class TestRandomNumbers:
    def test_the_mix_is_that_of_splitmix64(self) -> None:
        """The first five numbers of the published generator from the state 1234567."""
        states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GAMMA)
        assert mix(states).tolist() == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]

    def test_the_numbers_are_those_that_were_recorded(self) -> None:
        ids = np.array([0, 1, 2**64 - 1], np.uint64)
        drawn = uniforms(ids, seed=1, epoch=2, view=3, purpose=Purpose.FLIP, count=2)
        assert drawn.tolist() == RECORDED
        assert uniforms(ids, seed=-1, epoch=0, view=0, purpose=1, count=1).shape == (3, 1)

    def test_more_numbers_begin_with_the_fewer(self) -> None:
        ids = some_ids(5)
        few = Draws(ids, 1, 2).uniforms(Purpose.CROP, 2)
        np.testing.assert_array_equal(Draws(ids, 1, 2).uniforms(Purpose.CROP, 9)[:, :2], few)

    @pytest.mark.parametrize("ids", [np.arange(50_000, dtype=np.uint64), some_ids(50_000)])
    def test_they_are_uniform_and_independent(self, ids: np.ndarray) -> None:
        """Counts of a grid against chi squared; the columns share nothing that shows."""
        base = {"seed": 0, "epoch": 0, "view": 0, "purpose": 1}
        columns = [uniforms(ids, **base, count=2)]
        columns += [
            uniforms(ids, **{**base, name: value}, count=1)
            for name in base
            for value in (2, 3)
            if base[name] != value
        ]
        drawn = np.concatenate(columns, axis=1)
        assert drawn.min() >= 0
        assert drawn.max() < 1
        spread = np.sqrt(2 * 99)
        cells = (drawn * 10).astype(int)
        for one in range(drawn.shape[1]):
            for other in range(one):
                counts = np.bincount(10 * cells[:, one] + cells[:, other], minlength=100)
                chi = ((counts - len(ids) / 100) ** 2).sum() / (len(ids) / 100)
                assert abs(chi - 99) < 5 * spread, (one, other)
        # An image and the one after it.
        assert (
            np.abs(np.corrcoef(drawn[1:].T, drawn[:-1].T)).max(
                where=~np.eye(20, dtype=bool), initial=0
            )
            < 0.025
        )

    def test_each_of_seed_epoch_view_purpose_and_id_changes_all(self) -> None:
        ids = some_ids(1000)
        first = {"seed": 5, "epoch": 6, "view": 7, "purpose": 8}
        drawn = {"first": uniforms(ids, **first, count=1)}
        for name, value in first.items():
            drawn[name] = uniforms(ids, **{**first, name: value + 1}, count=1)
        # Nor do two of them stand for each other.
        drawn["swapped"] = uniforms(ids, seed=6, epoch=5, view=7, purpose=8, count=1)
        assert len(np.unique(np.concatenate(list(drawn.values())))) == 1000 * len(drawn)


class TestPaddedCrop:
    def test_it_is_the_slice_of_the_padded_image(self) -> None:
        pixels, ids = images(200, 12, 20), some_ids(200)
        how = Augmentation(crop="pad_crop", pad=3, flip=True)
        made = augment(pixels, ids, how, seed=1, epoch=2, view=1)
        draws = Draws(ids, 1, 2, 1)
        starts, mirrored = offsets(draws, 3), flips(draws)
        for image, (row, column), mirror, result in zip(
            pixels.numpy(), starts, mirrored, made.numpy(), strict=True
        ):
            padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
            wanted = padded[row : row + 12, column : column + 20]
            np.testing.assert_array_equal(result, wanted[:, ::-1] if mirror else wanted)

    def test_every_offset_and_both_sides_come_as_often(self) -> None:
        draws = Draws(some_ids(40_500), 0, 0)
        starts = offsets(draws, 4)
        counts = np.bincount(9 * starts[:, 0] + starts[:, 1], minlength=81)
        assert len(counts) == 81
        assert ((counts - 500) ** 2 / 500).sum() < 80 + 5 * np.sqrt(160)
        assert abs(flips(draws).mean() - 0.5) < 0.01

    def test_a_border_of_no_pixel_leaves_the_image(self) -> None:
        pixels = images(4)
        how = Augmentation(crop="pad_crop", pad=0)
        assert torch.equal(augment(pixels, some_ids(4), how, seed=0, epoch=0), pixels)


class TestResizedCrop:
    @pytest.mark.parametrize(("high", "wide", "size"), [(32, 32, None), (48, 64, 32), (20, 20, 28)])
    def test_it_is_torchvisions_of_the_drawn_boxes(
        self, high: int, wide: int, size: int | None
    ) -> None:
        pixels, ids = images(60, high, wide), some_ids(60)
        how = Augmentation(crop="resized_crop", size=size)
        made = augment(pixels, ids, how, seed=1, epoch=2)
        side = (high, wide) if size is None else (size, size)
        drawn = boxes(Draws(ids, 1, 2), (high, wide), scale=how.scale, ratio=how.ratio)
        for image, box, result in zip(pixels, drawn.tolist(), made, strict=True):
            wanted = torchvision.resized_crop(
                image.permute(2, 0, 1), *box, list(side), antialias=True
            )
            assert far(result, wanted.permute(1, 2, 0)) <= 1

    @pytest.mark.parametrize(
        ("size", "scale", "ratio"),
        [
            ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3)),
            ((64, 40), (0.2, 1.0), (3 / 4, 4 / 3)),
            ((16, 64), (0.9, 1.0), (3 / 4, 4 / 3)),  # none fits: the middle, by width
            ((64, 16), (0.9, 1.0), (3 / 4, 4 / 3)),
        ],
    )
    def test_the_boxes_are_distributed_as_torchvisions(
        self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
    ) -> None:
        number = 4000
        drawn = boxes(Draws(some_ids(number), 0, 0), size, scale=scale, ratio=ratio)
        image = torch.empty(3, *size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = np.array(
                [
                    RandomResizedCrop.get_params(image, list(scale), list(ratio))
                    for _ in range(number)
                ]
            )
        assert drawn.min() >= 0
        assert (drawn[:, :2] + drawn[:, 2:] <= np.array(size)).all()
        for of in (
            lambda box: box[:, 2] * box[:, 3] / np.prod(size),
            lambda box: np.log(box[:, 3] / box[:, 2]),
            lambda box: box[:, 0],
            lambda box: box[:, 1],
        ):
            ours, wanted = np.sort(of(drawn)), np.sort(of(theirs))
            every = np.union1d(ours, wanted)
            steps = [np.searchsorted(v, every, side="right") / number for v in (ours, wanted)]
            # Kolmogorov and Smirnov's two samples: 1.95 is passed with probability 0.001.
            assert np.abs(steps[0] - steps[1]).max() < 1.95 * np.sqrt(2 / number)


class TestColours:
    @pytest.mark.parametrize(
        ("change", "adjust", "low", "high"),
        [
            (colours.brighter, torchvision.adjust_brightness, 0, 1.8),
            (colours.contrasted, torchvision.adjust_contrast, 0, 1.8),
            (colours.saturated, torchvision.adjust_saturation, 0, 1.8),
            (colours.hue_shifted, torchvision.adjust_hue, -0.5, 0.5),
        ],
    )
    def test_each_change_is_torchvisions(self, change, adjust, low, high) -> None:
        pixels = planes(images(40))
        pixels[0] = 7  # grey all over: no hue
        factors = np.linspace(low, high, 40).astype(np.float32)
        made = change(pixels, factors)
        for image, factor, result in zip(pixels, factors, made, strict=True):
            wanted = adjust(torch.from_numpy(image), float(factor))
            assert far(result, wanted) <= 1

    def test_grey_is_torchvisions(self) -> None:
        pixels = planes(images(20))
        wanted = torchvision.rgb_to_grayscale(torch.from_numpy(pixels))
        assert far(colours.grey(pixels), wanted) <= 1

    def test_an_image_meets_the_changes_in_its_own_order(self) -> None:
        pixels, ids = images(60), some_ids(60)
        made = augment(pixels, ids, Augmentation(jitter=JITTER, grey=0.2), seed=1, epoch=2)
        draws = Draws(ids, 1, 2)
        what = colours.changes(draws, JITTER)
        is_grey = draws.uniforms(Purpose.GREY, 1)[:, 0] < 0.2
        assert len(np.unique(what.order, axis=0)) > 12
        assert 0 < what.applied.sum() < 60
        assert 0 < is_grey.sum() < 60
        adjust = (
            torchvision.adjust_brightness,
            torchvision.adjust_contrast,
            torchvision.adjust_saturation,
            torchvision.adjust_hue,
        )
        for row, image in enumerate(pixels):
            wanted = image.permute(2, 0, 1)
            for column in what.order[row] if what.applied[row] else ():
                wanted = adjust[column](wanted, float(what.factors[row, column]))
            if is_grey[row]:
                wanted = torchvision.rgb_to_grayscale(wanted, num_output_channels=3)
            # A grey level that rounds the other way is stretched by the changes after it.
            assert far(made[row], wanted.permute(1, 2, 0)) <= 4
            apart = np.abs(made[row].numpy().astype(int) - wanted.permute(1, 2, 0).numpy())
            assert apart.mean() < 0.1

    def test_the_factors_are_drawn_from_torchvisions_ranges(self) -> None:
        how = Jitter(brightness=0.4, contrast=1.5, saturation=0, hue=0.1, probability=0.3)
        what = colours.changes(Draws(some_ids(20_000), 0, 0), how)
        np.testing.assert_allclose(what.factors.min(axis=0), [0.6, 0, 1, -0.1], atol=1e-3)
        np.testing.assert_allclose(what.factors.max(axis=0), [1.4, 2.5, 1, 0.1], atol=1e-3)
        np.testing.assert_allclose(what.factors.mean(axis=0), [1, 1.25, 1, 0], atol=0.02)
        assert abs(what.applied.mean() - 0.3) < 0.02

    def test_a_strength_of_nothing_changes_nothing(self) -> None:
        pixels = images(6)
        made = augment(pixels, some_ids(6), Augmentation(jitter=Jitter()), seed=0, epoch=0)
        assert torch.equal(made, pixels)


class TestSameEverywhere:
    @pytest.mark.parametrize("how", EACH.values(), ids=EACH.keys())
    def test_neither_batch_nor_order_changes_a_byte(self, how: Augmentation) -> None:
        pixels, ids = images(37), some_ids(37)
        before = pixels.clone()
        whole = augment(pixels, ids, how, seed=1, epoch=2, view=1)
        assert whole.dtype == torch.uint8
        assert whole.is_contiguous()
        for rows in np.split(np.random.default_rng(0).permutation(37), [1, 4, 11, 12]):
            part = augment(pixels[rows], ids[rows], how, seed=1, epoch=2, view=1)
            assert torch.equal(part, whole[rows])
        assert torch.equal(pixels, before)
        none = augment(pixels[:0], ids[:0], how, seed=1, epoch=2)
        assert none.shape == (0, *whole.shape[1:])

    @pytest.mark.parametrize("name", ["flip", "cifar", "resized", "jitter", "simclr"])
    def test_epoch_seed_and_view_change_the_images(self, name: str) -> None:
        pixels, ids = images(37), some_ids(37)
        base = {"seed": 1, "epoch": 2, "view": 0}
        first = augment(pixels, ids, EACH[name], **base)
        for key in base:
            other = augment(pixels, ids, EACH[name], **{**base, key: base[key] + 1})
            changed = (other != first).flatten(1).any(1)
            assert changed.float().mean() > 0.2
        other = augment(pixels, ids + np.uint64(1), EACH[name], **base)
        assert (other != first).any()


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"scale": (0, 1)}, "0 < first <= second"),
            ({"ratio": (2, 1)}, "0 < first <= second"),
            ({"scale": (0.5, 1.5)}, "a crop is at most the image"),
            ({"crop": "pad_crop", "size": 32}, "resizes nothing"),
            ({"pad": -1}, "greater than or equal to 0"),
            ({"jitter": {"hue": 0.6}}, "less than or equal to 0.5"),
            ({"grey": 1.1}, "less than or equal to 1"),
        ],
    )
    def test_a_section_that_means_nothing(self, values: dict[str, object], said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            Augmentation.model_validate(values)

    def test_pixels_and_ids_of_another_kind(self) -> None:
        pixels, ids = images(3), some_ids(3)
        for wrong in (pixels.float(), pixels[0], pixels.permute(0, 3, 1, 2)):
            with pytest.raises(ValueError, match=r"give uint8 \(N, H, W, 3\)"):
                augment(wrong, ids, CIFAR, seed=0, epoch=0)
        for other in (ids[:2], ids.astype(np.int64)):
            with pytest.raises(ValueError, match=r"give uint64 \(3,\)"):
                augment(pixels, other, CIFAR, seed=0, epoch=0)
