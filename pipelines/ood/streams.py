"""Scores that adapt to the stream of test images: each has a state, which `step` changes.

They are no rows of `SCORES`: what they give an image depends on the images before it and beside
it, so on the order of the stream and on its share of OOD images. `step` takes the next batch of
features and gives their scores, higher for ID; a new stream needs a new object. Nothing is drawn:
equal streams give equal scores.

Half-precision features are widened before anything is computed. The authors' public code adds
1e-8 to a probability before its logarithm, which float16 rounds to 0: the entropy of a word that
underflows is 0 x -inf, and the NaN then wins or loses every comparison in the memory. Entropies
here are those of log-softmax in at least float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipelines.ood.checks import Array, as_batch, check_positive, working_dtype
from pipelines.ood.scores import neg_label


class StreamScore(Protocol):
    """A score with a state."""

    def step(self, features: Array) -> Tensor:
        """Scores (B,), float64, of the stream's next images (B, D), of unit length."""


@dataclass(frozen=True)
class AdaNegSettings:
    """Those of the public code for ImageNet-1k, but for `beta`, which it cuts to 5.

    Attributes:
        length: rows of a proxy's memory: its text feature and at most `length` - 1 images.
        threshold: gamma, of the score `neg_label`, between ID and OOD.
        gap: g in [0, 1]; an image is kept as ID above threshold + g (1 - threshold), as OOD below
            (1 - g) threshold.
        weight: lambda, of the score with text proxies; that with the memory's has weight 1.
        beta: of the weights e^{-beta (1 - cosine)} of a proxy's rows; None: all are equal
            (task-adaptive proxies), else sample-adaptive ones.
        tau: temperature.
        groups: of the negative words, as in `neg_label`.
    """

    length: int = 10
    threshold: float = 0.5
    gap: float = 0.5
    weight: float = 0.1
    beta: float | None = 5.5
    tau: float = 0.01
    groups: int = 5


@dataclass
class _Kept:
    """The images of one proxy with their entropies."""

    features: list[Tensor]
    entropies: list[float]


class AdaNeg:
    """Zhang and Zhang 2024, "AdaNeg: Adaptive Negative Proxy Guided OOD Detection with VLMs".

    Each class and each negative word is a proxy with a memory. Images whose `neg_label` score is
    far from the threshold join the memory of their likeliest class, or negative word; a full
    memory gives up the image of the largest entropy for one of a smaller entropy, taken over the
    classes or over the negative words alone. The score is `neg_label` with the memories' means in
    place of the text features, plus `weight` x `neg_label`.

    A batch joins the memories before it is scored. The memories depend on the order of the images
    and not on how the stream is cut into batches; the scores depend on both.

    `step` gives scores (B,) in [0, 1 + weight], float64.
    """

    def __init__(
        self, classes: Array, negatives: Array, settings: AdaNegSettings | None = None
    ) -> None:
        """Start with empty memories.

        Args:
            classes: unit text features (K, D).
            negatives: those of the negative words (M, D).
            settings: None: the defaults.

        Raises:
            ValueError: no class, no word, sizes that differ, or a setting out of range.
        """
        self._settings = settings or AdaNegSettings()
        _check_settings(self._settings.gap, self._settings.tau, self._settings.length)
        self._text, self._num_classes = _joined(classes, negatives)
        self._memory: dict[int, _Kept] = {}

    def step(self, features: Array) -> Tensor:
        """Keep what is far from the threshold, then score.

        Raises:
            ValueError: no row, a row of another size, or a value that is not finite.
        """
        images = _images(features, self._text)
        cosines = images @ self._text.T
        static = self._share(cosines)
        self._keep_confident(images, cosines, static)
        return self._share(self._adapted(images, cosines)) + self._settings.weight * static

    def _share(self, cosines: Tensor) -> Tensor:
        known, negative = cosines[:, : self._num_classes], cosines[:, self._num_classes :]
        return neg_label(known, negative, self._settings.tau, self._settings.groups)

    def _keep_confident(self, images: Tensor, cosines: Tensor, static: Tensor) -> None:
        is_known, is_unknown = _far(static, self._settings.threshold, self._settings.gap)
        sides = (
            (is_known, slice(0, self._num_classes)),
            (is_unknown, slice(self._num_classes, None)),
        )
        for is_kept, columns in sides:
            log_p = (cosines[:, columns] / self._settings.tau).log_softmax(dim=1)
            entropies = -(log_p.exp() * log_p).sum(dim=1)
            places = log_p.argmax(dim=1) + (columns.start or 0)
            for row in is_kept.nonzero().flatten().tolist():
                self._keep(int(places[row]), float(entropies[row]), images[row])

    def _keep(self, place: int, entropy: float, image: Tensor) -> None:
        kept = self._memory.setdefault(place, _Kept([], []))
        if len(kept.features) < self._settings.length - 1:
            kept.features.append(image)
            kept.entropies.append(entropy)
        elif kept.entropies and entropy < max(kept.entropies):
            worst = kept.entropies.index(max(kept.entropies))
            kept.features[worst], kept.entropies[worst] = image, entropy

    def _adapted(self, images: Tensor, cosines: Tensor) -> Tensor:
        """Cosines (B, K + M) with the proxies; those without images are text features.

        The cosine with a proxy, the sum of its rows by weights w, is sum_l w_l c_l / |sum|, and
        |sum|^2 = w'Gw with the rows' inner products G: no (B, K + M, D) is ever made.
        """
        places = [place for place, kept in self._memory.items() if kept.features]
        if not places:
            return cosines
        rows = self._text.new_zeros(len(places), self._settings.length, self._text.shape[1])
        rows[:, 0] = self._text[places]
        for number, place in enumerate(places):
            images_of = self._memory[place].features
            rows[number, 1 : 1 + len(images_of)] = torch.stack(images_of)
        near = torch.einsum("bd,rld->brl", images, rows)
        beta = self._settings.beta
        weights = torch.ones_like(near) if beta is None else torch.exp(-beta * (1 - near))
        products = torch.einsum("brl,rlm->brm", weights, rows @ rows.transpose(1, 2))
        length = (products * weights).sum(dim=2).clamp_min(torch.finfo(near.dtype).tiny).sqrt()
        adapted = cosines.clone()
        adapted[:, places] = (weights * near).sum(dim=2) / length
        return adapted


@dataclass(frozen=True)
class TANLSettings:
    """Those of the public code for ImageNet-1k.

    Attributes:
        num_labels: negative words that are active at a time; all of them where there are fewer.
        length: images whose activations are remembered, of each side.
        gap: as in `AdaNegSettings`.
        history: alpha in [0, 1], the share of what is remembered in the choice of words; the rest
            is the batch's own.
        stride: gamma >= 0; the score is the mean over the first `stride`, 2 `stride`, ... words,
            the most active first; 0: over all words at once.
        tau: temperature.
        num_scores: past scores that the threshold is taken from.
    """

    num_labels: int = 1000
    length: int = 300
    gap: float = 0.5
    history: float = 0.0
    stride: int = 1
    tau: float = 0.01
    num_scores: int = 20_000


class TANL:
    """Zhang et al. 2026, "Activation Matters: Test-time Activated Negative Labels".

    A word's activation is its softmax probability among all classes and all words of the corpus.
    Images whose score is far from the threshold are remembered as known or unknown; the words
    whose mean activation by unknown images most exceeds that by known ones become the negative
    words. A batch is scored twice: with the words of the past, which tells its known and unknown
    images, then with the words of the past and of these. The threshold is that of Otsu over past
    scores.

    The known side starts with the classes' own text features. The public code starts the unknown
    side with images of noise: `noise`. Without them it starts empty, and the first words are the
    ones that the classes activate least.

    Scores depend on the order and on how the stream is cut into batches. The threshold always
    parts the scores in two, also where the whole stream is ID.

    `step` gives scores (B,) in [0, 1], float64.
    """

    def __init__(
        self,
        classes: Array,
        corpus: Array,
        settings: TANLSettings | None = None,
        noise: Array | None = None,
    ) -> None:
        """Start with what the classes and the noise activate.

        Args:
            classes: unit text features (K, D).
            corpus: those of all words (M, D), mined or not.
            settings: None: the defaults.
            noise: unit features (Q, D) of images that are no thing.

        Raises:
            ValueError: no class, no word, sizes that differ, or a setting out of range.
        """
        self._settings = settings or TANLSettings()
        _check_settings(self._settings.gap, self._settings.tau, self._settings.length)
        if self._settings.num_labels < 1 or self._settings.stride < 0:
            raise ValueError(
                "need num_labels >= 1 and stride >= 0, came "
                f"{self._settings.num_labels} and {self._settings.stride}"
            )
        self._text, self._num_classes = _joined(classes, corpus)
        known = self._text[: self._num_classes]
        unknown = known[:0] if noise is None else _images(noise, self._text)
        cosines = torch.cat([known, unknown]) @ self._text.T
        activations = self._activations(cosines)
        self._known = activations[: len(known)][-self._settings.length :]
        self._unknown = activations[len(known) :][-self._settings.length :]
        self._scores = self._score(cosines, self._most_active(self._means()))

    def step(self, features: Array) -> Tensor:
        """Tell known from unknown images, choose words, score.

        Raises:
            ValueError: no row, a row of another size, or a value that is not finite.
        """
        cosines = _images(features, self._text) @ self._text.T
        first = self._score(cosines, self._most_active(self._means()))
        self._scores = torch.cat([self._scores, first])[-self._settings.num_scores :]
        sides = _far(first, otsu_threshold(self._scores), self._settings.gap)
        activations = self._activations(cosines)
        of_batch = [activations[side] for side in sides]
        means = [
            mean if not len(own) else mean.lerp(own.mean(dim=0), 1 - self._settings.history)
            for mean, own in zip(self._means(), of_batch, strict=True)
        ]
        result = self._score(cosines, self._most_active(means))
        self._known, self._unknown = (
            torch.cat([past, own])[-self._settings.length :]
            for past, own in zip((self._known, self._unknown), of_batch, strict=True)
        )
        return result

    def _activations(self, cosines: Tensor) -> Tensor:
        return (cosines / self._settings.tau).softmax(dim=1)[:, self._num_classes :]

    def _means(self) -> list[Tensor]:
        """Mean activations (M,) by known and by unknown images; 0 where there are none."""
        return [past.sum(dim=0) / max(1, len(past)) for past in (self._known, self._unknown)]

    def _most_active(self, means: list[Tensor]) -> Tensor:
        """The words, those that unknown images activate most above known ones first."""
        known, unknown = means
        order = torch.sort(unknown - known, descending=True, stable=True).indices
        return order[: self._settings.num_labels] + self._num_classes

    def _score(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """The mean over growing sets of words of the classes' share (`neg_label`), float64."""
        known = (cosines[:, : self._num_classes].double() / self._settings.tau).logsumexp(dim=1)
        negative = (cosines[:, labels].double() / self._settings.tau).logcumsumexp(dim=1)
        stride = self._settings.stride
        if stride:
            ends = [*range(stride - 1, len(labels) - 1, stride), len(labels) - 1]
        else:
            ends = [len(labels) - 1]
        return torch.sigmoid(known[:, None] - negative[:, ends]).mean(dim=1)


def otsu_threshold(scores: Tensor) -> float:
    """Otsu 1979: where the variance inside the two parts of scores (N,) in [0, 1] is least.

    Looked for at 0, 0.01 .. 0.99; of equal ones the middle one, and 0.5 where no threshold has
    scores on both sides.
    """
    thresholds = [number / 100 for number in range(100)]
    within = []
    for threshold in thresholds:
        is_above = scores >= threshold
        parts = scores[is_above], scores[~is_above]
        sums = [
            float(part.var(correction=0)) * len(part) if len(part) else math.inf for part in parts
        ]
        within.append(sum(sums))
    best = [t for t, value in zip(thresholds, within, strict=True) if value == min(within)]
    return best[len(best) // 2]


def _far(scores: Tensor, threshold: float, gap: float) -> tuple[Tensor, Tensor]:
    """Which scores lie far above the threshold, and which far below."""
    return scores > threshold + gap * (1 - threshold), scores < threshold - gap * threshold


def _joined(classes: Array, words: Array) -> tuple[Tensor, int]:
    """Text features (K + M, D) of classes and words, in at least float32, and K."""
    known, others = as_batch(classes, "classes"), as_batch(words, "words")
    if known.shape[1] != others.shape[1]:
        raise ValueError(
            f"classes and words need rows of one size, came {tuple(known.shape)} and "
            f"{tuple(others.shape)}"
        )
    dtype = working_dtype(known, others)
    return torch.cat([known.to(dtype), others.to(dtype)]), len(known)


def _images(features: Array, text: Tensor) -> Tensor:
    images = as_batch(features, "features")
    if images.shape[1] != text.shape[1]:
        raise ValueError(
            f"features need rows of {text.shape[1]} numbers, as the text features have; came "
            f"{tuple(images.shape)}"
        )
    return images.to(text)


def _check_settings(gap: float, tau: float, length: int) -> None:
    check_positive(tau, "tau")
    if not 0 <= gap <= 1 or length < 1:
        raise ValueError(f"need 0 <= gap <= 1 and length >= 1, came {gap} and {length}")
