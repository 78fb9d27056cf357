"""A registered model's content holds the code that can decide its verdicts, and no other."""

from __future__ import annotations

from pipelines.register.stage import model_code


def test_it_covers_the_model_the_head_and_the_score_alone() -> None:
    code = model_code("coop", "delta_energy")
    for module in (
        "pipelines.register.mlflow_model",
        "pipelines.register.detector",
        "pipelines.score.judge",
        "pipelines.heads.coop",
        "pipelines.ood.scores",
        "pipelines.backbones.encoder",
    ):
        assert module in code.modules
    for module in (
        "pipelines.pipeline",
        "pipelines.sweep.stage",
        "pipelines.report.page",
        "pipelines.heads.gallop",
        "pipelines.methods.ebm",
    ):
        assert module not in code.modules
    assert "torch" in code.libraries


def test_another_score_or_head_is_other_code() -> None:
    digests = {
        model_code(head, score).digest
        for head in ("coop", "linear_probe")
        for score in ("energy", "mcm", "knn", "feature_ebm", "energy+knn")
    }
    assert len(digests) == 10
