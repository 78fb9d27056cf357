"""Which edits change which addresses: scores, fitted records, statistics, counts, words, features.

Each row edits one definition in a copy of the project. The kinds that it names have another code,
all others the same one: nothing is stale, and nothing is made again for nothing.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import code_digest
from pipelines.backbones import onnx_engine
from pipelines.backbones.description import BackboneConfig
from pipelines.data.digits import DigitsSource
from pipelines.data.sources import FolderSource
from pipelines.embed import stage as embed
from pipelines.embed import text
from pipelines.finetune import outlier_prior
from pipelines.fitted import class_statistics, negative_words, record
from pipelines.score import code as score_code
from pipelines.score import stage as score

MINI = BackboneConfig(name="mini", kind="mini")
KINDS: dict[str, Callable[[], code_digest.Code]] = {
    "scores mcm": lambda: score_code.score_code("zero_shot", ["mcm"], score.score_shard),
    "scores delta_energy+knn": lambda: score_code.score_code(
        "linear_probe", ["delta_energy+knn"], score.score_shard
    ),
    "fit knn": lambda: record.fit_code("knn"),
    "fit vim": lambda: record.fit_code("vim"),
    "fit gaussian_mixture": lambda: record.fit_code("gaussian_mixture"),
    "fit energy_correction": lambda: record.fit_code("energy_correction"),
    "fit delta_energy+knn": lambda: record.fit_code("delta_energy+knn"),
    "statistics": lambda: class_statistics.statistics_code(),
    "prior": lambda: outlier_prior.prior_code(),
    "words": lambda: negative_words.words_code(),
    "text": lambda: text.text_code(MINI),
    "features of digits": lambda: embed.feature_code(DigitsSource(), MINI),
    "features of a folder": lambda: embed.feature_code(FolderSource(root="images"), MINI),
    "features by onnxruntime": lambda: embed.feature_code(
        DigitsSource(), MINI, engine=onnx_engine.engine
    ),
}
SCORES = {"scores mcm", "scores delta_energy+knn"}
OF_STATISTICS = {"statistics", "fit gaussian_mixture", "fit energy_correction"}
FEATURES = {"features of digits", "features of a folder", "features by onnxruntime"}

# File, a line of it, what stands there instead; the kinds whose code changes.
EDITS = {
    "a score": (
        "ood/scores.py",
        "def mcm(",
        "def mcm(*, _edited=1,",
        {"scores mcm"},
    ),
    "a score that nothing here uses": ("ood/scores.py", "def gen(", "def gen(*, _edited=1,", set()),
    "a score of a sum": (
        "ood/scores.py",
        "def delta_energy(",
        "def delta_energy(*, _edited=1,",
        {"scores delta_energy+knn", "fit delta_energy+knn"},
    ),
    "a density": (
        "ood/nearest_neighbours.py",
        "class KNN:",
        "class KNN:\n    edited = 1\n",
        {"scores delta_energy+knn", "fit knn", "fit delta_energy+knn"},
    ),
    "another density": (
        "ood/density.py",
        "class KLMatching:",
        "class KLMatching:\n    edited = 1\n",
        set(),
    ),
    "the training of energy models": (
        "ood/energy_training.py",
        "class EnergyTrainer:",
        "class EnergyTrainer:\n    edited = 1\n",
        {"fit energy_correction"},
    ),
    "the mixture that a network corrects": (
        "methods/energy_correction.py",
        "statistics, weighted=self.weighted,",
        "statistics, weighted=not self.weighted,",
        {"fit energy_correction"},
    ),
    "how scores are judged": (
        "score/judge.py",
        "BLOCK_ROWS = 256",
        "BLOCK_ROWS = 128",
        SCORES,
    ),
    "how a part is written": (
        "score/stage.py",
        "def score_shard(",
        "def score_shard(*, _edited=1,",
        SCORES,
    ),
    "how a shard is read": (
        "data/members.py",
        "class SetMembers:",
        "class SetMembers:\n    edited = 1\n",
        SCORES | OF_STATISTICS | {"prior"},
    ),
    "how class statistics are merged": (
        "ood/statistics.py",
        "class ClassStatistics:",
        "class ClassStatistics:\n    edited = 1\n",
        # The other densities fit statistics of their own features.
        OF_STATISTICS | {"fit knn", "fit vim"},
    ),
    "a head": (
        "heads/zero_shot.py",
        "chosen = tuple(config.templates or context.templates)",
        "chosen = tuple(context.templates)",
        {"scores mcm", "prior"},
    ),
    "a head that nothing here uses": (
        "heads/coop.py",
        "def build(",
        "EDITED = 1\n\n\ndef build(",
        set(),
    ),
    "mining": (
        "ood/negatives.py",
        "percentile: float = 0.05",
        "percentile: float = 0.06",
        {"words"},
    ),
    "which near words are kept": (
        "ood/negatives.py",
        "nearest) <= max_cosine)",
        "nearest) < max_cosine)",
        {"words"},
    ),
    "by which rule words are chosen": (
        "fitted/negative_words.py",
        "if not kind.are_near:",
        "if kind.are_near:",
        {"words"},
    ),
    "which relatives are near, which the words themselves say": (
        "fitted/wordnet.py",
        "DEPTH = 2",
        "DEPTH = 3",
        set(),
    ),
    "decoding": ("data/images.py", "def decode(", "def decode(*, _edited=1,", FEATURES),
    "one source": (
        "data/digits.py",
        "def read(self, keys: Sequence[str])",
        "def read(self, keys: Sequence[str], edited: int = 1)",
        {"features of digits", "features by onnxruntime"},
    ),
    "an engine": (
        "backbones/onnx_engine.py",
        "inter_op_num_threads = threads, 1",
        "inter_op_num_threads = threads, 2",
        {"features by onnxruntime"},
    ),
    "encoding of images": (
        "backbones/encoder.py",
        "class Encoder:",
        "class Encoder:\n    edited = 1\n",
        FEATURES,
    ),
    "the pass over shards, which decides no result": (
        "compute/shard_map.py",
        "WINDOW = 1024",
        "WINDOW = 512",
        set(),
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    package = Path(code_digest.__file__).parents[1]
    shutil.copytree(package, root / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture
def digests(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, str]]:
    """The code of every kind, as the copy has it."""
    of_copy = functools.partial(code_digest.code_of, root=tree)
    for module in (
        class_statistics,
        embed,
        negative_words,
        outlier_prior,
        record,
        score_code,
        text,
    ):
        monkeypatch.setattr(module, "code_of", of_copy)

    def ask() -> dict[str, str]:
        code_digest._code_of.cache_clear()  # an edit in a running process, for once
        return {kind: code().digest for kind, code in KINDS.items()}

    return ask


@pytest.fixture
def edited(tree: Path) -> Iterator[Callable[[str, str, str], None]]:
    kept: dict[Path, bytes] = {}

    def edit(file: str, line: str, other: str) -> None:
        path = tree / "pipelines" / file
        kept[path] = path.read_bytes()
        content = kept[path].decode()
        assert content.count(line) == 1, line
        path.write_text(content.replace(line, other))

    yield edit
    for path, content in kept.items():
        path.write_bytes(content)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_exactly_the_addresses_that_it_can_decide(
    name: str,
    digests: Callable[[], dict[str, str]],
    edited: Callable[[str, str, str], None],
) -> None:
    file, line, other, wanted = EDITS[name]
    before = digests()
    edited(file, line, other)
    after = digests()
    assert {kind for kind in KINDS if before[kind] != after[kind]} == wanted


def test_every_kind_has_a_code_of_its_own(digests: Callable[[], dict[str, str]]) -> None:
    assert len(set(digests().values())) == len(KINDS)
