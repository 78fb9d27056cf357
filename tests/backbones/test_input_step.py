"""Steps up a score against the formulas in float64, written out with open_clip's own model."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from pipelines.backbones import network
from pipelines.backbones.clip import Clip
from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.encoder import Encoded, Encoder, Preparer, of_both
from pipelines.backbones.input_step import InputStep
from pipelines.compute.cluster import ComputeConfig
from pipelines.data.images import Rejected
from pipelines.data.sources import FolderSource
from pipelines.data.storage import Storage
from pipelines.embed import stage as embed
from pipelines.embed.config import EmbedConfig
from pipelines.embed.plan import Plan
from pipelines.embed.workers import ShardEncoder, ShardReceipt, Work
from pipelines.ood import ODIN, Mahalanobis
from pipelines.ood import odin as odin_score

Files = dict[str, tuple[Path, Path]]
TAU, EPS = 5.0, 0.02


def config_of(files: Files, tower: str) -> BackboneConfig:
    architecture, weights = files[tower]
    return BackboneConfig(name=tower, config=str(architecture), path=str(weights))


def classes(number: int = 3, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(number, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def step_of(
    tau: float = TAU, eps: float = EPS, text: np.ndarray | None = None, scale: float = 1.0
) -> InputStep:
    """ODIN's step towards these classes, with similarities times `scale` as logits."""
    return InputStep(ODIN.fit((classes() if text is None else text) * scale, tau=tau), eps)


class ByHand:
    """log max_k softmax(f(x) / tau)_k of one image in [0, 1], in float64."""

    def __init__(self, files: Files, tower: str) -> None:
        architecture, weights = files[tower]
        self.model = open_clip.CLIP(**json.loads(architecture.read_text())).eval().double()
        self.model.load_state_dict({k: v.double() for k, v in load_file(weights).items()})
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).double().view(3, 1, 1)
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD).double().view(3, 1, 1)
        self.text = torch.from_numpy(classes()).double()

    def feature(self, image: torch.Tensor) -> torch.Tensor:
        encoded = self.model.encode_image(((image - self.mean) / self.std)[None])[0]
        return encoded / encoded.norm()

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        return self.model.logit_scale.exp() * (self.text @ self.feature(image))

    def log_probability(self, image: torch.Tensor) -> torch.Tensor:
        f = self.logits(image) / TAU
        return f.max() - f.exp().sum().log()


def random_pixels(loaded: Clip, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (number, *loaded.image_size, 3)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_every_pixel_takes_the_step_of_the_formula(backbone_files: Files, tower: str) -> None:
    loaded = network.load(config_of(backbone_files, tower))
    hand = ByHand(backbone_files, tower)
    pixels = random_pixels(loaded, 2)
    found = step_of(scale=loaded.logit_scale).perturb(loaded, pixels).double()
    for number in range(2):
        image = pixels[number].permute(2, 0, 1).double() / 255
        inputs = image.clone().requires_grad_()
        (slope,) = torch.autograd.grad(hand.log_probability(inputs), inputs)
        moved = found[number] * hand.std + hand.mean - image  # in units of a pixel in [0, 1]
        clear = slope.abs() > 1e-3 * slope.abs().max()  # float32 tells these signs
        assert clear.float().mean() > 0.95
        assert (moved[clear] - EPS * slope.sign()[clear]).abs().max() < 1e-6
        # The gradient itself against differences, at the pixels of the largest slopes.
        for place in slope.abs().flatten().topk(5).indices.tolist():
            step = torch.zeros_like(image).flatten()
            step[place] = 1e-6
            step = step.reshape(image.shape)
            with torch.no_grad():
                rise = hand.log_probability(image + step) - hand.log_probability(image - step)
            assert rise.item() / 2e-6 == pytest.approx(slope.flatten()[place].item(), rel=1e-4)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_features_are_those_of_the_moved_image(
    backbone_files: Files, pictures: Path, tower: str
) -> None:
    loaded = network.load(config_of(backbone_files, tower))
    hand = ByHand(backbone_files, tower)
    contents: list[bytes | Exception] = [p.read_bytes() for p in sorted(pictures.rglob("*.jpg"))]
    contents = [*contents[:5], b""]
    keys = [str(number) for number in range(6)]
    batches = [list(batch) for batch in Preparer(loaded.crop).batches(keys, contents, 4)]
    step = step_of(scale=loaded.logit_scale)
    encoded = Encoder(loaded, 4, pixel_pass=step).encode(batches)
    features = encoded.columns["feature"]
    assert [None if v is None else v.reason for v in encoded.verdicts] == [None] * 5 + ["empty"]
    good = [item for batch in batches for item in batch[:5] if isinstance(item, np.ndarray)]
    expected, probabilities = [], []
    for crop in good:
        image = torch.from_numpy(crop.copy()).permute(2, 0, 1).double() / 255
        inputs = image.clone().requires_grad_()
        (slope,) = torch.autograd.grad(hand.log_probability(inputs), inputs)
        with torch.no_grad():
            moved = image + EPS * slope.sign()
            expected.append(hand.feature(moved).numpy())
            probabilities.append(hand.log_probability(moved).exp().item())
            assert hand.log_probability(moved) > hand.log_probability(image)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-3)  # a sign near 0 may differ
    scores = odin_score(loaded.logit_scale * features @ classes().T, TAU)
    np.testing.assert_allclose(scores, probabilities, rtol=1e-3)
    np.testing.assert_allclose(step.score(features), scores, rtol=1e-5)
    plain = Encoder(loaded, 4).encode(batches).columns["feature"]
    assert np.abs(plain - features).max() > 1e-3
    still = Encoder(loaded, 4, pixel_pass=step_of(eps=0.0)).encode(batches).columns["feature"]
    np.testing.assert_allclose(still, plain, rtol=0, atol=1e-6)


def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Features (60, 16) of unit length in three classes, and those."""
    labels = np.arange(60) % 3
    rows = classes()[labels] + 0.3 * np.random.default_rng(2).normal(size=(60, 16))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def gaussian() -> Mahalanobis:
    """Fitted to them."""
    return Mahalanobis.fit(*clusters())


def test_a_step_up_the_mahalanobis_score_is_that_of_the_formula(backbone_files: Files) -> None:
    loaded, hand = network.load(config_of(backbone_files, "vit")), ByHand(backbone_files, "vit")
    rows, labels = clusters()
    means = torch.from_numpy(np.stack([rows[labels == k].mean(axis=0) for k in range(3)]))
    within = torch.from_numpy(rows) - means[labels]
    inverse = torch.linalg.inv(within.T @ within / 60)

    def score(image: torch.Tensor) -> torch.Tensor:
        away = hand.feature(image) - means
        return -torch.einsum("cd,de,ce->c", away, inverse, away).min()

    pixels = random_pixels(loaded, 1)
    found = InputStep(gaussian(), EPS).perturb(loaded, pixels).double()[0]
    image = pixels[0].permute(2, 0, 1).double() / 255
    inputs = image.clone().requires_grad_()
    (slope,) = torch.autograd.grad(score(inputs), inputs)
    moved = found * hand.std + hand.mean - image
    clear = slope.abs() > 1e-3 * slope.abs().max()
    assert clear.float().mean() > 0.95
    assert (moved[clear] - EPS * slope.sign()[clear]).abs().max() < 1e-6
    assert score(image + moved) > score(image)


def test_its_shards_have_an_address_of_their_own(
    backbone_files: Files, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def in_this_process(rows: list, plans: dict[str, Plan], work: Work, _layout: object) -> object:
        actor = ShardEncoder(work, {name: plan.source for name, plan in plans.items()})
        made.extend(row.address for row in rows)
        for row in rows:
            (receipt,) = actor(row.table())["receipt"].to_pylist()
            yield ShardReceipt.model_validate_json(receipt)

    monkeypatch.setattr(embed, "_encode_shards", in_this_process)
    storage = Storage.open(str(tmp_path))
    source = FolderSource(root=str(pictures))
    ways = [
        None,
        step_of(),
        step_of(eps=2 * EPS),
        step_of(tau=TAU / 2),
        step_of(text=classes(seed=1)),
        step_of(text=classes()[:2]),
        InputStep(gaussian(), EPS),
    ]
    caches = []
    for step in (*ways, *ways):  # the second time all are found
        cache = embed.embed_source(
            source,
            "mine",
            config_of(backbone_files, "vit"),
            storage,
            settings=EmbedConfig(batch_size=8, shard_rows=16),
            compute=ComputeConfig(),
            pixel_pass=step,
        )
        caches.append(cache)
    assert len(set(made)) == len(ways)
    assert len(made) == 2 * len(ways)  # two shards each
    assert caches[: len(ways)] == caches[len(ways) :]
    keys = caches[0].keys().to_pylist()
    columns = [cache.load(keys) for cache in caches[: len(ways)]]
    for one in range(len(ways)):
        for other in range(one):
            assert not np.allclose(columns[one], columns[other], rtol=0, atol=1e-6)
    assert set(caches[1].manifest.about["pixel_pass"]) == {"score", "record", "eps"}


def test_a_row_that_is_not_finite_stops_no_other(backbone_files: Files) -> None:
    loaded = network.load(config_of(backbone_files, "vit"))
    pixels = random_pixels(loaded, 2)
    alone = step_of().perturb(loaded, pixels)

    class Broken:
        """The model, but with no number for the first image."""

        def __getattr__(self, name: str) -> object:
            return getattr(loaded, name)

        def features(self, images: torch.Tensor) -> torch.Tensor:
            found = loaded.features(images)
            return torch.cat([found[:1] * float("nan"), found[1:]])

    assert torch.equal(step_of().perturb(Broken(), pixels)[1], alone[1])


def test_rows_of_two_passes_stay_those_of_one_image() -> None:
    bad, worse = Rejected("not_finite", "no number"), Rejected("empty", "no bytes")
    rows = np.arange(4, dtype=np.float32)[:, None]
    plain = Encoded({"feature": rows[[0, 2, 3]]}, [None, bad, None, None, worse])
    moved = Encoded({"feature": -rows[[0, 1, 3]]}, [None, None, bad, None, worse])
    one, other = of_both(plain, moved)
    assert one.columns["feature"].tolist() == [[0.0], [3.0]]
    assert other.columns["feature"].tolist() == [[0.0], [-3.0]]
    assert one.verdicts == other.verdicts == [None, bad, bad, None, worse]
