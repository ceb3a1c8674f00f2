"""Regular files are read as they were when they were opened, and nothing else is."""

from __future__ import annotations

import os
import socket

import pytest

from lightkit._util.regular_files import open_regular
from lightkit.errors import DataError


def test_reads_what_was_there(tmp_path):
    """Whole, in parts, from any place; what is appended meanwhile is not seen, and what is cut off is gone."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with open_regular(path) as file:
        assert file.read(10) == bytes(range(10))
        with open(path, "ab") as other:
            other.write(b"more")
        assert file.read() == bytes(range(10, 100)) and file.read() == b"" and file.read(5) == b""
        file.seek(95)
        assert file.read(50) == bytes(range(95, 100))
        os.truncate(path, 3)
        file.seek(0)
        assert file.read() == bytes(range(3))
    assert open_regular(path).readline() == bytes(range(3))


def test_sizes_and_kinds(tmp_path, monkeypatch):
    """A file that is too large, a pipe, a socket, a device, a folder, and nothing are named, and none is waited for."""
    (tmp_path / "large").write_bytes(bytes(11))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        cases = {
            "large": "has 11 bytes, and no more than 10 are read",
            "pipe": "is a pipe",
            "socket": "is a socket",
            "/dev/null": "is a device",
            ".": "is a folder",
            "nothing": "cannot be read: No such file or directory",
            "circle": "cannot be read: Too many levels of symbolic links",
        }
        for path, message in cases.items():
            with pytest.raises(DataError, match=f"^the input {message}"):
                open_regular(path, 10, name="the input")
