"""IDX files: valid ones are read, and errors name the damage of others."""

from __future__ import annotations

import gzip
import os
import struct

import pytest
import torch

from lightkit.data.idx import read_idx
from lightkit.errors import DataError


def idx_bytes(sizes, values, kind=0x08):
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + bytes(values)


GOOD = idx_bytes((2, 3), range(6))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("sizes", [(6,), (2, 3), (1, 2, 3), (0, 28, 28)])
def test_reads(tmp_path, compressed, sizes):
    """Files of any number of dimensions are read, compressed or not; the content decides."""
    count = torch.Size(sizes).numel()
    path = tmp_path / "file"
    data = idx_bytes(sizes, range(count))
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert torch.equal(read_idx(path), torch.arange(count, dtype=torch.uint8).reshape(sizes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (b"hello world", "not an IDX file"),
        (idx_bytes((2,), (1, 2), kind=0x0D), "expected unsigned bytes"),
        (GOOD[:9], "its header alone takes 12"),
        (GOOD[:-1], r"truncated: 17 bytes, its header \(shape \(2, 3\)\) says 18"),
        (GOOD + b"x", "too long"),
        (gzip.compress(GOOD, mtime=0)[:-9], "truncated or corrupt"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 9, "truncated or corrupt"),
        (idx_bytes((2**31, 2**31), ()), "truncated"),
    ],
)
def test_damaged(tmp_path, content, message):
    """Each kind of damage is an error that names the file, not a crash or a wrong tensor."""
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_no_more_is_unpacked_than_the_header_says(tmp_path, monkeypatch):
    """Of a file of 200 MB, only the 6 bytes in its header are unpacked, or nothing."""
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(200 << 20), compresslevel=1))
    unpacked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda *args: unpacked.append(read(*args)) or unpacked[-1])
    with pytest.raises(DataError, match=r"too long: more than 18 bytes, its header \(shape \(2, 3\)\) says 18"):
        read_idx(path)
    assert sum(map(len, unpacked)) <= len(GOOD) + 1
    path.write_bytes(gzip.compress(idx_bytes((2**20, 2**12), bytes(100))))
    with pytest.raises(DataError, match=r"too large: its header .* says 4294967308 bytes, more than 1073741824"):
        read_idx(path)


@pytest.mark.parametrize("sizes", [(0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (2**32 - 1, 0, 2**32 - 1, 2**32 - 1)])
def test_empty_shapes_beyond_any_tensor(tmp_path, sizes):
    """A shape without values whose other sizes overflow is one clear error."""
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(sizes, ()))
    with pytest.raises(DataError, match="which no tensor can have"):
        read_idx(path)


def test_reads_regular_files_alone(tmp_path):
    """A read of a pipe or a device might not end: both are errors."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "link", "a device"), (tmp_path, "a folder")):
        with pytest.raises(DataError, match=f"is {kind}, and must be a regular file"):
            read_idx(path)


def test_missing(tmp_path):
    """The error names a missing file."""
    with pytest.raises(DataError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")
