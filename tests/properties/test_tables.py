"""Any small CSV, Parquet or tar file as a source: an index and bytes, or a UserError; in time."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipelines.config import UserError
from pipelines.data.sources import FolderSource, open_source
from tests.properties.profiles import both
from tests.properties.test_images import WHOLE

IMAGE = WHOLE[0]
File = tuple[str, bytes]


def opens_or_says_why(file: File) -> None:
    """The whole of a source is listed and read, or one error says why not."""
    name, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        (Path(folder) / "a.png").write_bytes(IMAGE)
        try:
            if name.endswith((".parquet", ".tar")) and name != "index.parquet":
                source = open_source(str(path))
            else:
                source = FolderSource(root=folder, table=str(path))
            keys = source.index()["key"].to_pylist()
            found = source.read(keys[:5])
        except UserError as error:
            keys, found = [str(error)], [error]
        assert all(isinstance(key, str) and key for key in keys)
        assert len(found) == len(keys[:5])
        assert all(isinstance(content, bytes | Exception) for content in found)
        assert sorted(p.name for p in Path(folder).iterdir()) == sorted({name, "a.png"})


def parquet(**columns: list[object]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def tar(*members: tuple[str, bytes, bytes]) -> bytes:
    """Members as (name, type, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


PARQUETS = [
    parquet(image=[IMAGE], key=["a"]),
    parquet(image=[IMAGE, IMAGE], key=["a", "a"]),
    parquet(image=[IMAGE, IMAGE], key=["a", None]),
    parquet(image=[None, b""], key=["a", "b"]),
    parquet(image=["text"], key=["a"]),
    parquet(image=[{"bytes": IMAGE, "path": "x"}]),
    parquet(image=[{"bytes": None, "path": None}]),
    parquet(image=[1]),
    parquet(key=["a"]),
    parquet(image=[]),
    parquet(image=[IMAGE], label=[1]),
    parquet(image=[IMAGE], key=["../../x"]),
    parquet(image=[IMAGE], key=["/etc/passwd"]),
    parquet(image=[IMAGE], key=["a\nb\x1b[31m"]),
    parquet(image=[IMAGE], key=[b"\xff"]),
    parquet(image=[[IMAGE]], key=["a"]),
]
TARS = [
    tar(("a.png", tarfile.REGTYPE, IMAGE)),
    tar(("a.png", tarfile.REGTYPE, IMAGE), ("a.png", tarfile.REGTYPE, WHOLE[4])),
    tar(("../a.png", tarfile.REGTYPE, IMAGE), ("/a.png", tarfile.REGTYPE, IMAGE)),
    tar(("a.png", tarfile.SYMTYPE, b""), ("b.png", tarfile.LNKTYPE, b"")),
    tar(("a.png", tarfile.FIFOTYPE, b""), ("b.png", tarfile.CHRTYPE, b"")),
    tar(("a.cls", tarfile.REGTYPE, b"999999999999999999999"), ("a.png", tarfile.REGTYPE, IMAGE)),
    tar(("x\udcff.png", tarfile.REGTYPE, IMAGE)),
    tar(("a\x1b[31m\n.png", tarfile.REGTYPE, IMAGE)),
    tar(),
]
CSVS = [
    b"key,class_name\na.png,x\n",
    b"key\na.png\na.png\n",
    b"key\na.p\x00ng\n",
    b"key\n../../etc/passwd\n",
    b"key\n\xff\xfe\n",
    b"key,key\na.png,b\n",
    b"class_name\nx\n",
    b"key,class_name\na.png\n",
    b'key\n"a.png\n',
    b"key\n" + b"a" * 100_000 + b"\n",
    b"key\n",
    b"",
    b"\x00",
    b"," * 5000,
]
FILES: list[File] = [
    *[("x.parquet", content) for content in PARQUETS],
    *[("x.parquet", content[: len(content) // 2]) for content in PARQUETS],
    *[("x.tar", content) for content in TARS],
    *[("x.tar", content[:700]) for content in TARS],
    *[("index.csv", content) for content in CSVS],
    *[("index.parquet", content) for content in PARQUETS[:5]],
]


@st.composite
def damaged(draw: st.DrawFn) -> File:
    name, whole = draw(st.sampled_from(FILES))
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return name, bytes(content)


test_files, test_files_long = both(opens_or_says_why, damaged(), FILES, short=80, long=5000)
