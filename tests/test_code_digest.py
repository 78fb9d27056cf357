"""What a digest of code covers: everything that can decide a result, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.code_digest import code_of

FILES = {
    "pipelines/__init__.py": '"""Toy."""\n',
    "pipelines/maths.py": '''
"""Scores."""
import numpy as np
from pipelines.table import Table

SCALE = 2.0


def first(x):
    """First."""
    return np.asarray(x) * SCALE + _shared(x)


def second(x):
    return -first(x)


def _shared(x):
    return 1


def unrelated(x):
    return 0


SCORES: Table[int] = Table({"first": first, "second": second})
''',
    "pipelines/table.py": "class Table(dict):\n    pass\n",
    "pipelines/plugins/__init__.py": """
import importlib, pkgutil
PLUGINS = {
    i.name: importlib.import_module(f"{__name__}.{i.name}") for i in pkgutil.iter_modules(__path__)
}
""",
    "pipelines/plugins/a.py": "class Config:\n    lr = 1\n\n\ndef loss(x):\n    return x\n",
    "pipelines/plugins/b.py": "class Config:\n    lr = 2\n\n\ndef loss(x):\n    return -x\n",
    "pipelines/model.py": """
class Model:
    size = 3

    def __init__(self):
        self.reset()

    def reset(self):
        return 0

    def used(self):
        return self.helper()

    def helper(self):
        return 1

    def not_used(self):
        return 2
""",
    "pipelines/stage.py": """
from __future__ import annotations
from typing import TYPE_CHECKING
from pipelines import maths
from pipelines import plugins as all_plugins
from pipelines.maths import SCORES
from pipelines.model import Model
from pipelines import network as nets
if TYPE_CHECKING:
    from pipelines.other import Thing


def run(model: Model, name: str, thing: Thing):
    return judge(model, SCORES[name], all_plugins.PLUGINS)


def judge(model, score, plugins):
    import pipelines.lazy as lazy

    return score(model.used()), maths.SCALE, lazy.work(), nets.Network()(1)


def apart():
    return 5
""",
    "pipelines/network.py": """
from torch import nn


class Base(nn.Module):
    def forward(self, x):
        return x


class Network(Base):
    def forward(self, x):
        return 2 * x
""",
    "pipelines/lazy.py": "def work():\n    return 1\n\n\ndef rest():\n    return 2\n",
    "pipelines/other.py": "class Thing:\n    pass\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


ENTRIES = ("pipelines.stage.run", "pipelines.plugins.a", "pipelines.maths.first")


def digest(tree: Path, *entries: str) -> str:
    from pipelines import code_digest

    code_digest._code_of.cache_clear()
    code_digest.parse.cache_clear()
    return code_of(*(entries or ENTRIES), root=tree).digest


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("stage.py", "return score(model.used()),", "return score(model.used() + 1),", True),
        ("stage.py", "return 5", "return 6", False),
        ("maths.py", "np.asarray(x) * SCALE", "np.asarray(x) / SCALE", True),
        ("maths.py", "SCALE = 2.0", "SCALE = 3.0", True),
        ("maths.py", "    return 1\n", "    return 7\n", True),
        ("maths.py", "return 0", "return 9", False),
        ("maths.py", "return -first(x)", "return first(x)", False),  # another row of the table
        ("maths.py", '"second": second}', '"second": second, "third": unrelated}', False),
        ("maths.py", '    """First."""\n', '    """The first."""  # said better\n', False),
        ("maths.py", "SCALE = 2.0\n", "SCALE = 2.0\n\nprint('imported')\n", True),
        ("model.py", "return 1", "return 4", True),  # a method that a used method calls
        ("model.py", "return 0", "return 4", True),  # called by a dunder
        ("model.py", "return 2", "return 4", False),  # nothing names it
        ("model.py", "size = 3", "size = 4", True),
        ("plugins/a.py", "return x", "return 2 * x", True),
        ("plugins/b.py", "return -x", "return -2 * x", False),
        ("lazy.py", "return 1", "return 3", True),  # imported inside a function
        ("lazy.py", "return 2", "return 3", False),
        ("network.py", "return x", "return -x", True),
        ("network.py", "return 2 * x", "return 3 * x", True),  # called by the library
        ("other.py", "pass", "x = 1", False),  # for type checkers
        ("table.py", "pass", "x = 1", False),
    ],
)
def test_an_edit_changes_the_digest_exactly_where_it_can_decide(
    tree: Path, file: str, old: str, new: str, changes: bool
) -> None:
    before = digest(tree)
    path = tree / "pipelines" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert (digest(tree) != before) is changes


def test_a_new_plug_in_changes_nothing_for_those_who_do_not_use_it(tree: Path) -> None:
    before = digest(tree)
    (tree / "pipelines" / "plugins" / "c.py").write_text("def loss(x):\n    return 0\n")
    assert digest(tree) == before
    assert digest(tree, *ENTRIES, "pipelines.plugins.c") != before


def test_libraries_that_compute_are_named_with_their_versions(tree: Path) -> None:
    import numpy

    code = code_of(*ENTRIES, root=tree)
    assert code.libraries["numpy"] == numpy.__version__
    assert "torch" in code.libraries  # the bases of a class
    assert "torch" not in code_of("pipelines.maths.first", root=tree).libraries


def test_what_changed_is_named(tree: Path) -> None:
    from pipelines import code_digest

    before = code_of(*ENTRIES, root=tree)
    path = tree / "pipelines" / "maths.py"
    path.write_text(path.read_text().replace("SCALE = 2.0", "SCALE = 3.0"))
    code_digest._code_of.cache_clear()
    now = code_of(*ENTRIES, root=tree)
    assert now.changes(before.parts) == ["pipelines.maths"]
    assert now.changes({**now.parts, "numpy": "0"}) == ["numpy"]


def test_a_function_that_counts_alone_is_followed_in_its_module_only(tree: Path) -> None:
    def digests() -> tuple[str, set[str]]:
        from pipelines import code_digest

        code_digest._code_of.cache_clear()
        code_digest.parse.cache_clear()
        code = code_of("pipelines.lazy.rest", alone=["pipelines.stage.run"], root=tree)
        return code.digest, set(code.modules)

    before, modules = digests()
    assert modules == {"pipelines.lazy", "pipelines.stage"}
    path = tree / "pipelines" / "stage.py"
    path.write_text(path.read_text().replace("return 5", "return 6"))
    assert digests()[0] == before
    path.write_text(path.read_text().replace("maths.SCALE,", "2 * maths.SCALE,"))
    assert digests()[0] != before


def test_a_method_is_an_entry(tree: Path) -> None:
    before = digest(tree, "pipelines.model.Model.not_used")
    assert before != digest(tree, "pipelines.model.Model")
    path = tree / "pipelines" / "model.py"
    path.write_text(path.read_text().replace("return 2", "return 4"))
    assert digest(tree, "pipelines.model.Model.not_used") != before


def test_what_is_no_definition_of_the_project_is_refused(tree: Path) -> None:
    for entry in ("pipelines.maths.none", "numpy.asarray", "pipelines.none.at_all"):
        with pytest.raises(ValueError, match="no definition"):
            code_of(entry, root=tree)


def test_objects_of_the_project_are_entries() -> None:
    from pipelines.ood import SCORES
    from pipelines.ood import scores as module

    by_name = code_of("pipelines.ood.scores.delta_energy")
    assert code_of(SCORES["delta_energy"].function).digest == by_name.digest
    assert set(code_of(module).modules) >= set(by_name.modules)
