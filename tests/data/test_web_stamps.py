"""A file replaced behind a web address is another file; a server that cannot say so is refused."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import UserError
from pipelines.data import limits
from pipelines.data.sources import FolderSource, ParquetSource, open_source


class Server(SimpleHTTPRequestHandler):
    """Sends the headers in `told` and no other that says something of the content."""

    told: frozenset[str] = frozenset({"Last-Modified"})

    def log_message(self, *_: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified" or keyword in self.told:
            super().send_header(keyword, value)
        if keyword == "Last-Modified" and "ETag" in self.told:
            changed = Path(self.translate_path(self.path)).stat().st_mtime_ns
            super().send_header("ETag", f'"{changed}"')


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(Server, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def replace(path: Path, seconds: int) -> None:
    """Other content of the same size, changed that much later."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + seconds * 10**9))


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("kind", ["parquet", "folder", "table"])
def test_a_replaced_file_has_another_fingerprint(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, kind: str
) -> None:
    monkeypatch.setattr(Server, "told", frozenset({header}))
    image = tmp_path / "images" / "a.jpg"
    image.parent.mkdir()
    image.write_bytes(b"some bytes")
    (tmp_path / "index.csv").write_text("key\na.jpg\n")
    pq.write_table(pa.table({"key": ["a"], "image": [b"x" * 100]}), tmp_path / "x.parquet")
    folder = f"{address}/images"
    source, file = {
        "parquet": (open_source(f"{address}/x.parquet"), tmp_path / "x.parquet"),
        "folder": (FolderSource(root=folder), image),
        "table": (FolderSource(root=folder, table=f"{address}/index.csv"), image),
    }[kind]
    before = source.fingerprint()
    assert source.fingerprint() == before
    replace(file, seconds=5)
    assert source.fingerprint() != before


def test_a_server_that_says_nothing_is_refused_with_the_way_out(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "told", frozenset())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"some bytes")
    pq.write_table(pa.table({"key": ["a"], "image": [b"x"]}), tmp_path / "x.parquet")
    for source in (
        ParquetSource(root=f"{address}/x.parquet"),
        FolderSource(root=f"{address}/images"),
    ):
        with pytest.raises(
            UserError, match=r"neither ETag nor Last-Modified for 1 of 1 files.*down"
        ):
            source.fingerprint()
    assert FolderSource(root=f"{address}/images").read(["a.jpg"]) == [b"some bytes"]


def test_a_file_behind_an_address_is_refused_by_its_size(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    with (tmp_path / "images" / "huge.jpg").open("wb") as file:
        file.truncate(limits.LIMITS.image_bytes + 1)
    (bad,) = FolderSource(root=f"{address}/images").read(["huge.jpg"])
    assert isinstance(bad, OSError)
    assert "268,435,457 bytes, over 268,435,456" in str(bad)
