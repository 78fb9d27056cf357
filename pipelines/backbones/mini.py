"""The embedded backbone: a miniature open_clip model that the project trains in seconds.

It learns captions of the digits 0 to 7 (training indices only) in the styles plain, inverted
and noisy, so that it knows a concept outside the benchmark's classes (7), has never met two (8
and 9), knows two of the shifted styles and has never seen the other two. It is kept as an
open_clip JSON and safetensors, and is loaded by the function that loads every other backbone.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.backbones.threads import torch_threads
from pipelines.config import digest
from pipelines.data import digits
from pipelines.data.kept import Entry
from pipelines.data.storage import Storage
from pipelines.ood.seeds import generator
from pipelines.records import StoredRecord

if TYPE_CHECKING:
    import open_clip

logger = logging.getLogger(__name__)

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": digits.SIZE, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}
CONCEPTS = digits.NAMES[:8]
STYLES = {"plain": "plain", "inverted": "inverted", "noisy": "noisy"}
TEMPLATES = (
    "a photo of the digit {}.",
    "the handwritten number {}.",
    "a {}.",
    "a picture of a {}.",
)
# Short on purpose: the model knows its concepts well, but not so well that methods cannot differ.
STEPS, BATCH_SIZE, LR, SEED = 160, 64, 1e-3, 0
DECAY = 0.01  # AdamW's default; VERSION stands for it in the address
VERSION = 1

Progress = Callable[[int, int], None]


class MiniManifest(StoredRecord):
    """What says that the trained backbone at an address is complete."""

    address: str


def ensure(storage: Storage, on_progress: Progress | None = None) -> tuple[Path, Path]:
    """The paths of the JSON and the weights, trained first where they are missing.

    Args:
        storage: a local one; the files lie under `cache/backbones/`.
        on_progress: called with (steps done, steps in all).

    Raises:
        UserError: where `storage` is not a folder of this machine.
    """
    address = digest(
        {
            "architecture": ARCHITECTURE,
            "recipe": [STEPS, BATCH_SIZE, LR, SEED],
            "captions": [CONCEPTS, list(STYLES), TEMPLATES],
            "data": digits.DigitsSource().fingerprint(),
            "split": _train_indices(),
            "version": VERSION,
            "torch": torch.__version__,
        }
    )
    folder = ("cache", "backbones", f"mini-{address}")
    names = "model.json", "model.safetensors"
    paths = storage.local(*folder, names[0]), storage.local(*folder, names[1])
    entry = Entry(storage, folder, MiniManifest)
    if entry.find() is None:
        weights = {k: v.contiguous() for k, v in train(on_progress).state_dict().items()}
        described = json.dumps(ARCHITECTURE, indent=1, sort_keys=True) + "\n"
        contents = described.encode(), save(weights)
        entry.write(MiniManifest(address=address), dict(zip(names, contents, strict=True)))
    return paths


def train(on_progress: Progress | None = None) -> open_clip.CLIP:
    """Train the miniature model; the same bits every time on one machine."""
    import open_clip

    if on_progress:
        on_progress(0, STEPS)
    with _repeatable(SEED):
        model = open_clip.CLIP(**ARCHITECTURE)
        images, concepts, styles = _training_images()
        vocabulary = _Vocabulary.of(model, _captions())
        random = generator(SEED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=LR, total_steps=STEPS, pct_start=0.1
        )
        model.train()
        for step in range(STEPS):
            rows = torch.randint(len(images), (BATCH_SIZE,), generator=random)
            template = int(torch.randint(len(TEMPLATES), (1,), generator=random))
            styled = bool(torch.rand(1, generator=random) < 0.5)
            target = concepts[rows]
            if styled:
                target = target * len(STYLES) + styles[rows]
            tokens = vocabulary.captions[styled][template]
            loss = _caption_loss(model, images[rows], tokens, target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            vocabulary.decay(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            if on_progress and (step + 1) % 20 == 0:
                on_progress(step + 1, STEPS)
        vocabulary.put_back(model)
    return model.eval()


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """The few token embeddings that captions use, trained apart from the 49,000 others.

    A token that no caption holds has no gradient, so AdamW only decays its embedding. `decay` does
    that in one product, where the optimiser would take as long over these embeddings as over all
    other weights. The trained model has the same bytes.

    Attributes:
        captions: tokens by style and template; each is the number of its row in `used`.
        used: the tokens of the captions, ascending: the end of a text, which CLIP takes for the
            largest token, stays the largest.
        others: the embeddings of all tokens; those of `used` are out of date until `put_back`.
    """

    captions: dict[bool, list[Tensor]]
    used: Tensor
    others: Tensor

    @classmethod
    def of(cls, model: Any, captions: dict[bool, list[Tensor]]) -> _Vocabulary:
        """Take the whole vocabulary out of the model, which keeps the rows of the captions."""
        every = [tokens.flatten() for of in captions.values() for tokens in of]
        used: Tensor = torch.cat(every).unique()  # type: ignore[no-untyped-call]
        others = model.token_embedding.weight.detach()
        model.token_embedding.weight = nn.Parameter(others[used])
        rows = {s: [torch.searchsorted(used, t) for t in of] for s, of in captions.items()}
        return cls(rows, used, others)

    def decay(self, rate: float) -> None:
        """Decay the embeddings as a step of AdamW does where there is no gradient."""
        self.others.mul_(1 - rate * DECAY)

    def put_back(self, model: Any) -> None:
        """Give the model its whole vocabulary again."""
        self.others[self.used] = model.token_embedding.weight.detach()
        model.token_embedding.weight = nn.Parameter(self.others)


def _caption_loss(model: Any, images: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each image over every caption of the template, one of which is right."""
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(tokens, normalize=True)
    return cross_entropy(model.logit_scale.exp() * image @ text.T, target)


def _train_indices() -> list[int]:
    known = digits.labels() < len(CONCEPTS)
    return [i for i, part in sorted(digits.split().items()) if part == "train" and known[i]]


def _training_images() -> tuple[Tensor, Tensor, Tensor]:
    """Normalised pixels (N, 3, H, W), concept (N,) and style (N,) of every training image."""
    import open_clip

    transform = open_clip.image_transform(digits.SIZE, is_train=False)
    indices = _train_indices()
    keys = [f"digits/{i:04d}/{style}" for i in indices for style in STYLES]
    encoded = digits.DigitsSource().read(keys)
    pixels = [transform(Image.open(io.BytesIO(e))) for e in encoded if isinstance(e, bytes)]
    concepts = np.repeat(digits.labels()[indices], len(STYLES))
    styles = np.tile(np.arange(len(STYLES)), len(indices))
    return torch.stack(pixels), torch.from_numpy(concepts), torch.from_numpy(styles)


def _captions() -> dict[bool, list[Tensor]]:
    """Tokens of every caption by template: without a style word (False) and with one (True)."""
    import open_clip

    tokenize = open_clip.SimpleTokenizer(context_length=ARCHITECTURE["text_cfg"]["context_length"])
    bare = [tokenize([t.format(c) for c in CONCEPTS]) for t in TEMPLATES]
    styled = [
        tokenize([t.format(f"{s} {c}") for c in CONCEPTS for s in STYLES.values()])
        for t in TEMPLATES
    ]
    return {False: bare, True: styled}


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """A fixed seed and one thread inside, the caller's random state and threads after.

    One thread, because the order of sums follows the number of threads, and because two that
    wait for each other on a busy machine are slower than one.
    """
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
