"""A trial's address changes with the code and settings that decide its record, and only then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines import code_digest
from pipelines.config import digest
from pipelines.methods import METHODS, MethodConfig
from pipelines.sweep.network_trial import judging_code
from pipelines.sweep.spec import MakeSpec, trial_code
from pipelines.train.cache import network_code
from tests.sweep.network_toy import NEW, network

COOP: MethodConfig = METHODS["coop"].Config()
EBM: MethodConfig = METHODS["ebm"].Config()
PLAIN = ("mcm", "delta_energy")
EVERY = {"coop", "ebm", "ebm without scores", "knn", "network"}
# A file, a name in it whose definition is edited, and what does change with it.
EDITS = [
    ("finetune/loop.py", "def train_in_process(", {"coop", "ebm", "ebm without scores", "knn"}),
    ("finetune/together.py", "def train_together(", {"coop", "ebm", "ebm without scores", "knn"}),
    ("heads/coop.py", "def build(", {"coop", "ebm", "ebm without scores", "knn"}),
    ("heads/clip_adapter.py", "def build(", set()),
    ("methods/ebm.py", "def loss(", {"ebm", "ebm without scores"}),
    ("methods/outlier_exposure.py", "def loss(", set()),
    ("ood/losses.py", "def masked_energy_change(", {"ebm", "ebm without scores"}),
    ("ood/losses.py", "def outlier_exposure(", set()),
    ("ood/scores.py", "def delta_energy(", {"coop", "ebm", "network"}),
    ("ood/scores.py", "def max_logit(", set()),
    ("ood/metrics.py", "def auroc(", EVERY),
    ("ood/nearest_neighbours.py", "    def __call__(", {"knn"}),
    ("score/search.py", "def temperatures(", EVERY),
    ("sweep/space.py", "def settings(", set()),
    ("sweep/proposed.py", "def run_proposed(", set()),
    ("sweep/choice.py", "def choose(", set()),
    # Of a network, training and judging.
    ("train/loop.py", "def train_network(", {"network"}),
    ("methods/energy_margin.py", "def loss(", {"network"}),
    ("backbones/kinds/cifar.py", "def _conv(", {"network"}),
    ("sweep/network_trial.py", "def judge(", {"network"}),
    ("train/batches.py", "def steps_of(", {"network"}),
    ("train/stage.py", "def train_here(", set()),
    ("sweep/networks.py", "def run(", set()),
]
TRIALS = {
    "coop": (COOP, PLAIN),
    "ebm": (EBM, PLAIN),
    "ebm without scores": (EBM, ("msp",)),
    "knn": (COOP, ("mcm", "knn")),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's source."""
    root = tmp_path_factory.mktemp("copy")
    for path in (code_digest.ROOT / "pipelines").rglob("*.py"):
        place = root / path.relative_to(code_digest.ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return root


@pytest.fixture(scope="module")
def before(tree: Path) -> dict[str, str]:
    return digests(tree)


def digests(root: Path) -> dict[str, str]:
    code_digest._code_of.cache_clear()
    found = {name: trial_code(*given, root=root).digest for name, given in TRIALS.items()}
    parts = network_code(network(), NEW, root=root), judging_code(PLAIN, root=root)
    return found | {"network": digest([code.digest for code in parts])}


@pytest.mark.parametrize(("file", "definition", "expected"), EDITS)
def test_an_edit_changes_the_trials_that_it_can_decide(
    tree: Path, before: dict[str, str], file: str, definition: str, expected: set[str]
) -> None:
    path = tree / "pipelines" / file
    text = path.read_text()
    assert text.count(definition) == 1
    # A first parameter more: another function, whatever it did.
    path.write_text(text.replace(definition, f"{definition}edited, "))
    try:
        after = digests(tree)
    finally:
        path.write_text(text)
    assert {name for name in after if after[name] != before[name]} == expected


def test_a_new_plug_in_changes_no_trial(tree: Path, before: dict[str, str]) -> None:
    added = tree / "pipelines" / "heads" / "another.py"
    shutil.copyfile(tree / "pipelines" / "heads" / "coop.py", added)
    try:
        assert digests(tree) == before
    finally:
        added.unlink()


def test_what_trains_nothing_is_no_part_of_the_address() -> None:
    def address(
        method: MethodConfig, scores: tuple[str, ...] = PLAIN, inputs: str = "", lr: float = 0.01
    ) -> str:
        return MakeSpec("coop", method, scores, inputs)({"training.lr": lr}).address

    other = COOP.model_copy(update={"score": "energy", "score_params": {"mcm": {"tau": 0.5}}})
    assert address(other) == address(COOP)
    changed = [
        address(COOP, lr=0.02),
        address(COOP, scores=("mcm",)),
        address(COOP, inputs="others"),
        address(EBM),
    ]
    assert len({address(COOP), *changed}) == 5
