"""What is too large is refused by its size: files, tar members, Parquet cells and columns."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import UserError
from pipelines.data.images import Rejected, decode
from pipelines.data.limits import LIMITS
from pipelines.data.sources import FolderSource, ParquetSource, TarSource
from pipelines.data.stored_lists import read_list
from pipelines.embed.own_images import read_lines

ROOT = Path(__file__).parents[2]
TWO_GB = 2 * 10**9


def sparse(path: Path, size: int, at: int = 0, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(at)
        file.write(content)
    return path


def reasons(contents: list[bytes | Exception]) -> list[str]:
    return [str(content) if isinstance(content, Exception) else "read" for content in contents]


def test_a_huge_member_of_a_tar(tmp_path: Path) -> None:
    huge, small = tarfile.TarInfo("huge.jpg"), tarfile.TarInfo("small.jpg")
    huge.size, small.size = TWO_GB - TWO_GB % 512, 512
    second = 512 + huge.size
    path = sparse(tmp_path / "x.tar", second + 2048, second, small.tobuf() + b"s" * 512)
    with path.open("r+b") as file:
        file.write(huge.tobuf())
    source = TarSource(root=str(path))
    keys = source.index()["key"].to_pylist()
    assert keys == ["x.tar/huge.jpg", "x.tar/small.jpg"]
    large, fine = source.read(keys)
    assert isinstance(large, Rejected)
    assert large.reason == "too_large"
    assert fine == b"s" * 512


def test_a_huge_header_of_a_tar_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, TWO_GB - TWO_GB % 512
    path = sparse(tmp_path / "x.tar", 512 + header.size + 2048, 0, header.tobuf())
    (rest,) = TarSource(root=str(path)).index()["key"].to_pylist()
    (broken,) = TarSource(root=str(path)).read([rest])
    assert isinstance(broken, Rejected)
    assert "over 1,048,576" in broken.message


def test_a_compressed_tar_is_not_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.add(sparse(tmp_path / "a.jpg", 10**6), "a.jpg")
    (rest,) = TarSource(root=str(tmp_path / "x.tar")).index()["key"].to_pylist()
    assert rest == "x.tar/(after 0 images)"


@pytest.mark.slow
def test_cells_of_parquet_are_measured_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    huge = b"\0" * (LIMITS.image_bytes + 1)
    table = pa.table({"key": ["a", "b", "c"], "image": [b"one", huge, b"three"]})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 2**20
    assert reasons(ParquetSource(root=str(path)).read(["c", "b", "a"])) == [
        "read",
        "[Errno 27] 268,435,457 bytes, over 268,435,456",
        "read",
    ]


def test_a_column_of_names_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    name = pa.array(["n" * 10**6])
    rows = 5000  # 5 GB of names in a file of some kilobytes
    names = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), name)
    keys = [str(number) for number in range(rows)]
    pq.write_table(pa.table({"key": keys, "image": [b"x"] * rows, "class_name": names}), path)
    assert path.stat().st_size < 2**22
    with pytest.raises(UserError, match="5,000,000,000 bytes, over 1,073,741,824"):
        ParquetSource(root=str(path)).index()


def test_lists_and_tables_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    table = sparse(tmp_path / "index.csv", TWO_GB)
    with pytest.raises(UserError, match="2,000,000,000 bytes, over"):
        FolderSource(root=str(tmp_path), table=str(table)).index()
    with pytest.raises(UserError, match="2,000,000,000 bytes, over"):
        read_list(f"{table}#names")
    with pytest.raises(UserError, match="2,000,000,000 bytes, over"):
        read_lines(str(table), "class_names")
    (tmp_path / "deep.json").write_text("[" * 10**6)
    with pytest.raises(UserError, match="not readable as JSON"):
        read_list(f"{tmp_path}/deep.json#names")


def test_bytes_of_any_source_are_measured_before_they_are_decoded() -> None:
    with pytest.raises(Rejected, match="bytes, over 268,435,456"):
        decode(bytes(LIMITS.image_bytes + 1))


def test_one_huge_file_takes_no_memory(tmp_path: Path) -> None:
    path = sparse(tmp_path / "huge.jpg", TWO_GB)
    script = """
import resource, sys
from pathlib import Path
from pipelines.predict.stage import _read
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
from pipelines.data import files
before = peak()
print(_read(Path(sys.argv[1])))
assert peak() - before < 20, peak() - before
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2,000,000,000 bytes, over 268,435,456" in done.stdout
