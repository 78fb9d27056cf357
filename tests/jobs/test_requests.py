"""Requests that cannot be trained: one clear line each, exit status 2, before any work."""

import sys

import pytest

from jobs import main, pipeline, run_section


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """What the pipeline's job says of these words; nothing may have been computed."""

    def refuse(*words):
        storage = tmp_path / "outputs"
        line = ["jobs.pipeline", "sweep=none", f"storage={storage}", *words]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stopped:
            main("pipeline", run_section, pipeline.pipeline, "")
        assert stopped.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert not (storage / "cache").exists()
        lines = said.err.splitlines()
        assert all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]

    return refuse


NO_OUTLIERS = "benchmark.sets={train: {source: digits, classes: id, domains: [plain], splits: [train]}, test: {source: digits, classes: id, domains: [plain], splits: [test]}}"  # noqa: E501


def test_more_shots_than_exist(refused):
    (line,) = refused("methods=[coop]", "shots=100000")
    assert line.startswith("shots=100000: more than there are (zero: ")
    assert line.endswith("shots=null takes all")


def test_a_class_without_images(refused):
    (line,) = refused("methods=[coop]", "benchmark.class_names=[zero, one, dodo]")
    assert line == "set 'train' of benchmark 'digits': no image of class dodo"


@pytest.mark.parametrize("name", ["coop", "ebm", "linear_probe"])
def test_outliers_for_a_method_that_needs_none(refused, name):
    (line,) = refused(f"methods=[{name}]", f"methods.{name}.training.outlier_batch_size=32")
    assert "training.outlier_batch_size=32" in line
    assert "learns from no outliers" in line


@pytest.mark.parametrize("name", ["energy_margin", "outlier_exposure", "balanced_energy"])
def test_no_outliers_for_a_method_that_needs_some(refused, name):
    (line,) = refused(f"methods=[{name}]", NO_OUTLIERS)
    assert line == (
        f"methods.{name}: it learns from outliers and benchmark 'digits' has no set 'outliers'; "
        "add one, or choose a method that needs none"
    )


@pytest.mark.parametrize("name", ["energy_margin", "balanced_energy"])
def test_margins_in_the_wrong_order(refused, name):
    (line,) = refused(f"methods=[{name}]", f"methods.{name}.m_in=-3", f"methods.{name}.m_out=-7")
    assert line == (
        f"methods.{name}: m_in=-3.0 must be below m_out=-7.0: energies are low for images of the "
        "classes"
    )
    (line,) = refused(f"methods=[{name}]", f"methods.{name}.m_in=-3")
    assert "give both m_in and m_out, or neither" in line


def test_everything_wrong_with_a_configuration_is_listed_at_once(refused):
    lines = refused(
        "methods=[energy_margin, coop, ebm]",
        "methods.energy_margin.m_in=-3",
        "methods.energy_margin.m_out=-7",
        "methods.coop.training.outlier_batch_size=8",
        "methods.ebm.keep=2",
        "imbalance=3",
    )
    starts = ["methods.energy_margin", "methods.coop", "methods.ebm.keep=2", "imbalance=3"]
    assert [next(s for s in starts if line.startswith(s)) for line in lines] == starts


def test_everything_missing_in_the_data_is_listed_at_once(refused):
    lines = refused(
        "methods=[energy_margin, balanced_energy]",
        "shots=100000",
        "benchmark.class_names=[zero, one, dodo]",
        NO_OUTLIERS,
    )
    assert [line.partition(":")[0] for line in lines] == [
        "methods.energy_margin",
        "methods.balanced_energy",
        "shots=100000",
        "set 'train' of benchmark 'digits'",
    ]
