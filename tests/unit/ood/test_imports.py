import subprocess
import sys


def test_the_maths_loads_no_engine():
    """Researchers import it on its own: no Ray, MLflow or open_clip comes along."""
    program = "import sys, pipelines.ood\nprint(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert {"torch", "pipelines"} <= loaded
    assert loaded.isdisjoint(
        {"ray", "mlflow", "open_clip", "pyarrow", "omegaconf", "pydantic", "matplotlib", "pandas"}
    )
