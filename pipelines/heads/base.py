"""What heads share: what they are built from, what they give, the record of one, the predictor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.backbones.network_training import NetworkTraining
from pipelines.config import Section, UserError
from pipelines.heads.models import Backbone, ClassifierModel, TextModel
from pipelines.ood.energy import adjust_logits
from pipelines.ood.seeds import generator

# Arrays of a predictor by name, in float64 where a rule computes with them.
Arrays: TypeAlias = Mapping[str, NDArray[np.float64]]
# Plain values that a rule needs beside them, as JSON holds them.
Settings: TypeAlias = Mapping[str, float | str | Sequence[float]]
# `rule(arrays, settings, *rows)`: what a predictor makes of rows, in float64.
Rule: TypeAlias = Callable[..., NDArray[np.float64]]
# Rows of one product in `Predictor.similarity`: blocks are padded to it, so that a row is
# computed by the same operations whatever batch it comes in.
BLOCK_ROWS = 256
# The column of local features (N, P, D), in features on disk and in `HeadConfig.columns`.
LOCAL = "local_features"
# W (K, D) and b (K,) with logits = W z + b; b is None where it is 0.
LinearRule: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32] | None]


class HeadConfig(Section):
    """A head's settings; `name` tells which file in `pipelines/heads/` it belongs to."""

    name: str
    # What other parts need to know of a head before it is built.
    trainable: ClassVar[bool] = True
    has_text_features: ClassVar[bool] = True
    class_parallel: ClassVar[bool] = False
    # Arrays with a row for each training image that the head is built from, in `HeadContext`:
    # `local_features`, `domains`. With `local_features` among them, `encode` is given those of
    # its images as a second argument, and so is the predictor's rule.
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """What of the backbone it is built from: `text` or `classifier`; perhaps nothing."""
        return ("text",)

    @property
    def network(self) -> NetworkTraining | None:
        """How the whole network is trained with it; None: the backbone stays frozen."""
        return None


ConfigT = TypeVar("ConfigT", bound=HeadConfig)


@dataclass(frozen=True)
class HeadContext:
    """What a head may be built from.

    Attributes:
        backbone: the loaded backbone.
        class_names: K names.
        templates: prompts with `{}` for the class name.
        features: (N, D) training image features, on the device of training.
        labels: (N,) their classes.
        columns: further per-image training tensors (local features, domains), N rows each.
    """

    backbone: Backbone
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    features: Tensor
    labels: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def text(self) -> TextModel:
        """The backbone, for a head that needs its text tower.

        Raises:
            UserError: where it has none.
        """
        if not isinstance(self.backbone, TextModel):
            raise UserError(f"backbone {self.backbone.name}: it has no text tower")
        return self.backbone

    @property
    def classifier(self) -> ClassifierModel:
        """The backbone, for a head that needs its own linear layer.

        Raises:
            UserError: where it has none.
        """
        if not isinstance(self.backbone, ClassifierModel):
            raise UserError(f"backbone {self.backbone.name}: it is no image classifier")
        return self.backbone


@dataclass(frozen=True)
class HeadOutput:
    """What a head makes of a batch of image features.

    Attributes:
        similarity: (N, K).
        image_features: (N, D) the unit features that were compared, after any adapter.
        text_features: (K, D) the unit features they were compared with, or None.
        extra: further tensors for a method's loss, none of them one per image.
        rows: further tensors for a method's loss with one row per image.
    """

    similarity: Tensor
    image_features: Tensor
    text_features: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Head(Protocol):
    """A trainable classifier on image features; every head is an `nn.Module` too."""

    logit_scale: float

    def encode(self, image_features: Tensor) -> HeadOutput:
        """Similarities of (N, D) unit features, with what they were computed from."""

    def forward(self, image_features: Tensor) -> Tensor:
        """The similarity (N, K) alone; logits are similarity x logit_scale."""

    def text_features(self) -> Tensor:
        """(K, D) unit features of the classes, or a UserError where a head has none."""

    def predictor(self) -> Predictor:
        """The head as it is now, frozen for inference."""


def _never(config: HeadConfig) -> bool:  # noqa: ARG001 - a default for any head
    return False


@dataclass(frozen=True)
class HeadPlugin(Generic[ConfigT]):
    """The record of a head: what its file gives; what is left out, the head does without.

    Rules are called with the predictor's arrays in float64, its settings, and rows.

    Attributes:
        Config: the head's settings.
        build: (config, context, seed) to the head, an `nn.Module` that follows `Head`.
        similarity: the rule of the predictor, of features (N, D) to (N, K); with local features
            (N, P, D) as a further argument where `Config.columns` names them. A head with several
            prompts a class may give (N, M K): column j is of class j mod K, the first K columns
            predict the class, and scores read all of them.
        compared: the rule for the unit features (..., D) that are compared with text: `unchanged`,
            or what an adapter makes of them. The predictor's arrays then hold the classes'
            `text_features` (K, D). None: the head has no cosine with a word (a linear probe, a
            cache of training features), and scores that need one do not apply to it.
        global_similarity: the rule for whole images, of (N, D) to (N, K), where it is another
            than `similarity`.
        local_similarity: the rule for local features, of (N, P, D) to (N, P, K), where the
            classes' `text_features` are not what they are compared with.
        linear: (predictor) to W and b, where similarities are linear in the features. None: the
            scores that read a linear rule (ViM) do not apply.
        has_cosines: whether similarities are cosines, or play their part; not so for a network's
            own logits, and scores of cosines do not apply to those.
        takes_unit: whether it compares features, which then have unit length.
        has_activations: whether features are penultimate activations, `linear` the layer after.
        encode_batch: (head, image_features, columns) to its output; a training step calls it in
            place of `Head.encode`, for what differs from judging (sampled prompts) or needs the
            whole batch (its mean feature). `columns` holds those of `Config.columns`, for the
            images alone; outliers follow the images in `image_features`.
        encodes_together: whether heads of such settings can be encoded in one pass.
        encode_together: the text features (K, D) of each of several heads, from one pass.
    """

    Config: type[ConfigT]
    build: Callable[[ConfigT, HeadContext, int], Any]
    similarity: Rule
    compared: Rule | None = None
    global_similarity: Rule | None = None
    local_similarity: Rule | None = None
    linear: Callable[[Predictor], LinearRule] | None = None
    has_cosines: bool = True
    takes_unit: bool = True
    has_activations: bool = False
    encode_batch: Callable[[Any, Tensor, Mapping[str, Tensor]], HeadOutput] | None = None
    encodes_together: Callable[[ConfigT], bool] = _never
    encode_together: Callable[[Sequence[Any]], list[Tensor]] | None = None

    @property
    def gives(self) -> frozenset[str]:
        """What a score may read of such a head, in the words of `SCORES` and `FITTED_SCORES`."""
        given = {"logits", "features", "perturbed_features", "layers"}
        further = {
            "similarity": self.has_cosines,
            "local_similarity": self.compared is not None,
            "negative_similarity": self.compared is not None,
            "weight": self.linear is not None,
            "activations": self.has_activations,
        }
        return frozenset(given | {name for name, is_given in further.items() if is_given})


@dataclass(frozen=True)
class Predictor:
    """A trained head for inference: arrays and a rule, without the text tower.

    Attributes:
        head: the head's name; its plug-in's `similarity(arrays, settings, features)` is the rule.
        arrays: float32 arrays by name.
        settings: plain values that the rule needs.
        logit_scale: logits = similarity x logit_scale.
        class_names: K names, in the order of the columns.
        class_prior: (K,) share of each class in a long-tailed training set, for `adjustment`.
        adjustment: how far the predicted class is corrected for that prior; 0: not at all.
    """

    head: str
    arrays: Mapping[str, NDArray[np.float32]]
    settings: Settings
    logit_scale: float
    class_names: tuple[str, ...]
    class_prior: tuple[float, ...] = ()
    adjustment: float = 0.0

    @property
    def plugin(self) -> HeadPlugin[Any]:
        """The head's rules and its `Config`."""
        from pipelines.heads import HEADS  # here: the heads of the table import this module

        return HEADS[self.head]

    @property
    def takes_local(self) -> bool:
        """Whether the rule reads local features beside the image's own."""
        return LOCAL in self.plugin.Config.columns

    def similarity(
        self, features: NDArray[np.float32], local: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """(N, K) similarities of unit features (N, D); (N, M K) of M prompts a class.

        Args:
            features: of N images.
            local: (N, P, D) unit local features, for a head that takes them.

        Raises:
            UserError: where the head takes local features and there are none.
        """
        if self.takes_local and local is None:
            raise UserError(
                f"head {self.head} predicts from local features too, and there are none: embed "
                "with embed.local_features=true, or give images"
            )
        given = (features, local) if self.takes_local and local is not None else (features,)
        return self.in_blocks(self.plugin.similarity, *given)

    def in_blocks(self, rule: Rule, *given: NDArray[Any]) -> NDArray[np.float32]:
        """`rule(arrays, settings, *rows)` (N, ...) of N rows of every array in `given`.

        Computed in float64 in blocks of a fixed number of rows and rounded to float32 at the
        end, so that a row's result does not depend on the batch it comes in.
        """
        arrays = {name: array.astype(np.float64) for name, array in self.arrays.items()}
        count = len(given[0])
        result: NDArray[np.float32] | None = None
        # One block even of no rows: the rule says how many columns there are.
        for start in range(0, max(count, 1), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, count)
            blocks = []
            for array in given:
                block = np.zeros((BLOCK_ROWS, *array.shape[1:]))
                block[: stop - start] = array[start:stop]
                blocks.append(block)
            block_result = rule(arrays, self.settings, *blocks)
            if result is None:
                result = np.empty((count, *block_result.shape[1:]), dtype=np.float32)
            result[start:stop] = block_result[: stop - start]
        assert result is not None
        return result

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits (N, K) as the predicted class sees them, of (N, K) or more; scores take all as is.

        Menon 2021, equation 9 ("AdjLogit" of Choi 2023): f - adjustment x log class_prior.
        """
        logits = logits[:, : len(self.class_names)]
        if not self.adjustment:
            return logits
        return adjust_logits(logits, torch.tensor(self.class_prior), self.adjustment)

    def class_logits(self, similarity: NDArray[np.float32]) -> Tensor:
        """Logits (N, K), float64, whose largest names the class, of `similarity`."""
        return self.adjusted(torch.from_numpy(similarity).double() * self.logit_scale)

    def predicted(self, similarity: NDArray[np.float32]) -> NDArray[np.int64]:
        """The class (N,) of each row of `similarity`."""
        chosen: NDArray[np.int64] = self.class_logits(similarity).argmax(dim=1).numpy()
        return chosen

    def files(self) -> dict[str, bytes]:
        """The content of the files that hold this predictor."""
        description = {
            "head": self.head,
            "settings": dict(self.settings),
            "logit_scale": self.logit_scale,
            "class_names": list(self.class_names),
            "class_prior": list(self.class_prior),
            "adjustment": self.adjustment,
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return {
            "head.json": (json.dumps(description, indent=1, sort_keys=True) + "\n").encode(),
            "head.safetensors": safetensors.numpy.save(arrays),
        }

    def save(self, folder: Path) -> None:
        """Write `head.json` and `head.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Read what `save` wrote."""
        return cls.from_files(
            {name: (folder / name).read_bytes() for name in ("head.json", "head.safetensors")}
        )

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Predictor:
        """The predictor that `files()` described."""
        description = json.loads(files["head.json"])
        for name in ("class_names", "class_prior"):
            description[name] = tuple(description[name])
        return cls(arrays=safetensors.numpy.load(files["head.safetensors"]), **description)


def to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    """A float32 copy on the CPU."""
    return tensor.detach().float().cpu().numpy().copy()


def normal(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """N(0, std), drawn on the CPU: the same on every device and worker."""
    return torch.randn(shape, generator=generator(seed)) * std


def uniform(shape: tuple[int, ...], bound: float, seed: int) -> Tensor:
    """Uniform in +-bound, drawn on the CPU: the same on every device and worker."""
    return (torch.rand(shape, generator=generator(seed)) * 2 - 1) * bound
