"""A secret is planted in every place that takes an address; whatever is written lacks it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from jobs import main
from pipelines.config import ConfigError, UserError, load, to_yaml
from pipelines.config.secrets import credentials_in, mask, mask_uri
from pipelines.data.storage import Storage
from pipelines.settings.config import PipelineConfig
from pipelines.store.tracker import open_tracker
from tests.conftest import Store
from tests.ray.commands import job_here

SECRET = "geheim-5f3a"
URIS = [
    f"http://me:{SECRET}@127.0.0.1:9/x",
    f"https://{SECRET}@127.0.0.1:9/x",
    f"https://me:a/{SECRET}@127.0.0.1/x",
    f"https://me:a@{SECRET}@127.0.0.1/x",
    f"https://127.0.0.1/x.parquet?token={SECRET}",
    f"https://127.0.0.1/x?v=1&X-Amz-Signature={SECRET}&y=2",
    f"s3://AKIA:{SECRET}/+@bucket/x",
    f"postgresql+psycopg2://me:{SECRET}@127.0.0.1/db",
    f"simplecache::https://me:{SECRET}@127.0.0.1/x",
    f"HTTPS://ME:{SECRET}@127.0.0.1",
]
HARMLESS = [
    "http://127.0.0.1:5000",
    "http://[::1]:5000/x",
    "https://h/people/me@home.jpg",
    "https://h:8443/x?version=2",
    "s3://bucket/a=b/c@d",
    "hdfs://me@host/x",
    "abfss://container@account.dfs.core.windows.net/x",
    "sqlite:////data/mlflow.db",
    "models:/energy-ood@champion",
    "me@host:x",
]
BENCHMARK = """
name: own
class_names: [a, b]
sources: {{s: [{{kind: folder, root: "{uri}"}}]}}
sets: {{train: {{source: s}}, validation: {{source: s}}, test: {{source: s}}}}
"""


@pytest.mark.parametrize("uri", URIS)
def test_credentials_are_masked_and_found(uri: str) -> None:
    for text in (mask(uri), mask_uri(uri), mask(f"no answer from {uri}: refused")):
        assert SECRET not in text
        assert "***" in text
    (line,) = credentials_in({"a": [{"b": uri}]})
    assert line.startswith("a.0.b=")
    assert SECRET not in line


@pytest.mark.parametrize("uri", HARMLESS)
def test_an_address_without_them_stays_as_it_is(uri: str) -> None:
    assert mask(uri) == mask_uri(uri) == uri
    assert list(credentials_in({"a": uri})) == []


@pytest.mark.parametrize(
    ("key", "uri", "variable"),
    [
        ("tracking_uri", "http://me:x@h", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("tracking_uri", "https://x@h", "MLFLOW_TRACKING_TOKEN"),
        ("storage", "s3://a:b@c/d", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        ("tracking_uri", "postgresql://a:b@c/d", "PGPASSWORD"),
        ("source", "https://a:b@c/d", "FSSPEC_HTTPS="),
    ],
)
def test_the_line_names_what_to_set_instead(key: str, uri: str, variable: str) -> None:
    (line,) = credentials_in({key: uri})
    assert variable in line


def written(*folders: Path) -> bytes:
    return b"".join(p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file())


@pytest.mark.parametrize("uri", [URIS[0], URIS[4], URIS[6]])
@pytest.mark.parametrize(
    ("job", "word"),
    [
        ("pipeline", "tracking_uri={uri}"),
        ("pipeline", "storage={uri}"),
        ("pipeline", "benchmark.root={uri}"),
        ("pipeline", "benchmark=@{file}"),
        ("pipeline", "preset=@{preset}"),
        ("pipeline", "benchmark=@{uri}"),
        ("pipeline", "backbone.path={uri}"),
        ("pipeline", "benchmark.notes=[{uri}]"),
        ("pipeline", "{uri}"),
        ("pipeline", "share.{uri}"),
        ("pipeline", "seeds='{uri}'"),
        ("predict", "source={uri}"),
        ("predict", "model={uri}"),
        ("predict", "tracking_uri=${{oc.env:ADDRESS}}"),
        ("embed", "source={uri}"),
        ("embed", "source={{kind: folder, root: '{uri}'}}"),
        ("figures", "figure={uri}"),
    ],
)
def test_a_planted_secret_is_refused_and_told_to_nobody(
    job: str, word: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDRESS", uri)
    file, preset, storage = tmp_path / "own.yaml", tmp_path / "preset.yaml", tmp_path / "storage"
    file.write_text(BENCHMARK.format(uri=uri))
    preset.write_text(f"tracking_uri: '{uri}'\n")
    words = [word.format(uri=uri, file=file, preset=preset)]
    if job in ("pipeline", "predict") and not word.startswith("storage"):
        words.append(f"storage={storage}")
    done = job_here(job, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    assert SECRET not in done.stderr
    assert not storage.exists()


def test_help_does_not_tell_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--help", "all"]):
        done = job_here("pipeline", f"tracking_uri={URIS[0]}", *words)
        assert done.returncode == 2
        assert SECRET not in done.stdout + done.stderr


def test_what_a_library_was_given_is_kept_masked(mlflow_store: Store) -> None:
    config = load(PipelineConfig, "pipeline").model_copy(update={"tracking_uri": URIS[0]})
    assert SECRET not in to_yaml(config)
    tracker = mlflow_store.tracker
    with tracker.run("secrets") as active:
        active.log_params({"tracking_uri": URIS[0], "list": [URIS[4]]})
        active.set_tags({"source": URIS[6]})
    kept = tracker.client.get_run(active.run_id).data
    assert kept.params["tracking_uri"] == "http://***@127.0.0.1:9/x"
    assert SECRET.encode() not in written(mlflow_store.storage.local())


@pytest.mark.parametrize("uri", [URIS[0], URIS[1]])
def test_the_error_of_a_tracking_server(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    for address in (uri, "http://127.0.0.1:9"):
        with pytest.raises(UserError) as caught:
            open_tracker(Storage.open(str(tmp_path)), tracking_uri=address)
        assert SECRET not in str(caught.value)
        assert "127.0.0.1:9" in str(caught.value)


@pytest.mark.parametrize("uri", URIS)
def test_whatever_a_job_prints_of_it_is_masked(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["figures"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def fails(_: object) -> None:
        logging.getLogger("some.library").warning("trying %s", uri)
        raise UserError(f"no answer from {uri}")

    with pytest.raises(SystemExit) as caught:
        main("pipeline", lambda: PipelineConfig, fails, "")
    assert caught.value.code == 2
    error = OSError(f"no answer from {uri}")
    sys.excepthook(OSError, error, None)
    printed = capsys.readouterr().err
    assert SECRET not in printed
    assert printed.count("***") >= 2


def test_a_file_of_ones_own_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", SECRET)
    file = tmp_path / "own.yaml"
    file.write_text(BENCHMARK.format(uri="/nowhere") + "notes: ${oc.env:PLANTED}\n")
    with pytest.raises(ConfigError, match="allow_env=true") as caught:
        load(PipelineConfig, "pipeline", [f"benchmark=@{file}"])
    assert SECRET not in str(caught.value)
    allowed = load(PipelineConfig, "pipeline", [f"benchmark=@{file}", "allow_env=true"])
    assert allowed.benchmark.notes == SECRET
