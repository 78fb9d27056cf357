import subprocess
import sys


def loaded(modules: str) -> set[str]:
    """The packages that a fresh process has after importing these modules alone."""
    program = f"import sys, {modules}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_maths_loads_no_engine():
    """Researchers import it on its own: no Ray, MLflow or open_clip comes along."""
    found = loaded("pipelines.ood")
    assert {"torch", "pipelines"} <= found
    assert found.isdisjoint(
        {"ray", "mlflow", "open_clip", "pyarrow", "omegaconf", "pydantic", "matplotlib", "pandas"}
    )


def test_workers_on_cached_features_start_without_the_slow_packages():
    """They start by the dozen, and open_clip takes longer to import than torch."""
    found = loaded("pipelines.score.stage, pipelines.finetune.loop, pipelines.sweep.stage")
    assert found.isdisjoint({"open_clip", "torchvision", "timm", "mlflow", "matplotlib"})
