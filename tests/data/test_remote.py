"""Sources in stores that are not here: a bucket behind S3's protocol, and stores out of reach."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]

# The three requests of S3 that a source makes, over a folder: list, head and get, with ranges.
SERVER = """
import sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

ROOT = Path(sys.argv[1])

class Bucket(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        if bucket != "bucket":
            return self.answer(404)
        if not key:
            return self.listing(parse_qs(query).get("prefix", [""])[0])
        file = ROOT / key
        if not file.is_file():
            return self.answer(404)
        content = file.read_bytes()
        changed = file.stat().st_mtime_ns
        at = formatdate(changed / 1e9, usegmt=True)
        facts = {"ETag": '"%d"' % changed, "Last_Modified": at}
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            end = int(first) + len(part) - 1
            span = f"bytes {first}-{end}/{len(content)}"
            return self.answer(206, part, Content_Range=span, **facts)
        self.answer(200, content, **facts)

    do_HEAD = do_GET

    def listing(self, prefix):
        found = sorted(p for p in ROOT.rglob("*") if p.is_file())
        rows = [(p.relative_to(ROOT).as_posix(), p.stat().st_size) for p in found]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z"
            f"</LastModified><Size>{size}</Size></Contents>"
            for key, size in rows
            if key.startswith(prefix)
        )
        entries += f"<KeyCount>{entries.count('<Key>')}</KeyCount>"
        head = "<?xml version='1.0'?><ListBucketResult><Name>bucket</Name>"
        tail = "<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>"
        self.answer(200, (head + entries + tail).encode(), Content_Type="application/xml")

server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is the bucket `bucket`."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield folder, f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()
    process.stdout.close()


def python(script: str, *arguments: str, **environment: str) -> str:
    """What a process of its own prints: Arrow reads its environment once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "GOOGLE_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={**clean, "PYTHONPATH": str(ROOT), "AWS_EC2_METADATA_DISABLED": "true", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kind_of_source_in_a_bucket(bucket: tuple[Path, str], pictures: Path) -> None:
    folder, address = bucket
    for path in sorted(pictures.rglob("*.jpg"))[:4]:
        to = folder / "data" / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    script = """
    import sys, tarfile
    from pathlib import Path
    import pyarrow as pa, pyarrow.parquet as pq
    from pipelines.data.sources import FolderSource, open_source
    root = Path(sys.argv[1])
    files = sorted((root / "data").rglob("*.jpg"))
    rows = {"key": [f.name for f in files], "image": [f.read_bytes() for f in files]}
    pq.write_table(pa.table(rows), root / "images.parquet", row_group_size=3)
    with tarfile.open(root / "train.tar", "w") as archive:
        for file in files:
            archive.add(file, file.name)
    for name in ("data", "images.parquet", "train.tar"):
        there, here = open_source(f"s3://bucket/{name}"), open_source(str(root / name))
        keys = here.index()["key"].to_pylist()
        assert there.index().equals(here.index()), there.index()
        assert len(keys) == 4 and there.read(keys[::-1]) == here.read(keys[::-1])
        assert there.fingerprint() == there.fingerprint()
    source = FolderSource(root="s3://bucket/data")
    before = source.fingerprint()
    assert isinstance(source.read(["none.jpg"])[0], FileNotFoundError)
    files[0].write_bytes(b"other, and of another size")
    assert source.fingerprint() != before
    print("good")
    """
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "here"}
    assert python(script, str(folder), AWS_ENDPOINT_URL=address, **keys) == "good\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "hint"),
    [("s3://bucket/data", "AWS_ACCESS_KEY_ID"), ("gs://bucket/data", "GOOGLE_APPLICATION_")],
)
def test_a_store_out_of_reach_is_one_clear_line(uri: str, hint: str) -> None:
    script = """
    import sys
    from pipelines.config import UserError
    from pipelines.data import files
    from pipelines.data.sources import open_source
    files.GIVE_UP_AFTER_S = 2.0
    try:
        open_source(sys.argv[1]).index()
    except UserError as error:
        print(error)
    """
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_DEFAULT_REGION": "here"}
    said = python(script, uri, CLOUD_STORAGE_EMULATOR_ENDPOINT="http://127.0.0.1:9", **nowhere)
    assert said.startswith(f"{uri}: cannot be reached (")
    assert hint in said
    assert len(said.splitlines()) == 1
