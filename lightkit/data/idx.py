"""The IDX format of the MNIST family: a magic number, the sizes, then the values, big-endian."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lightkit.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> Tensor:
    """Reads a file of unsigned bytes, gzip-compressed or not.

    Args:
        path: the file; compression is recognised by content.

    Returns:
        A uint8 tensor of the shape that the header states.

    Raises:
        DataError: the file is missing, truncated, not IDX, or longer than its header says.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or corrupt: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    if len(data) < 4 or data[:2] != b"\x00\x00" or data[3] == 0:
        raise DataError(f"{path} is not an IDX file: it starts with {data[:4].hex() or 'nothing'}")
    if data[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} holds IDX type 0x{data[2]:02x}, expected unsigned bytes (0x08)")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise DataError(f"{path} is truncated: {len(data)} bytes, its header alone takes {header}")
    sizes = struct.unpack(f">{data[3]}I", data[4:header])
    expected = header + math.prod(sizes)
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "too long"
        raise DataError(f"{path} is {problem}: {len(data)} bytes, its header (shape {sizes}) says {expected}")
    if expected == header:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).reshape(sizes)
