"""A reader of the IDX format of the MNIST family: a magic number, the sizes, then the values, big-endian."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightkit._util.regular_files import open_regular
from lightkit.errors import DataError

_UNSIGNED_BYTE = 0x08

# The limit of an unpacked file. The images of the largest set of the family, EMNIST, take 0.6 GB.
MAX_BYTES = 1 << 30

# Bytes that are unpacked of a file without a magic number: gzip may find the damage there.
_LOOK_AHEAD = 1 << 20


def read_idx(path: str | Path, max_bytes: int = MAX_BYTES) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzip-compressed or not.

    Args:
        path: a regular file; its first two bytes decide whether it is compressed.
        max_bytes: the largest accepted size of the unpacked file in bytes.

    Returns:
        A uint8 tensor of the shape in the header.

    Raises:
        DataError: the file is missing, truncated, not IDX, longer than its header says, or larger than ``max_bytes``.
    """
    with _unpacked(path) as (stream, size):
        return _read(stream, size, max_bytes, Path(path))


def read_idx_shape(path: str | Path) -> tuple[int, ...]:
    """Reads the shape in the header of an IDX file of unsigned bytes, gzip-compressed or not, and none of its values.

    Raises:
        DataError: the file is missing or not IDX, or its header is truncated.
    """
    with _unpacked(path) as (stream, _):
        return _read_shape(stream, Path(path))


@contextmanager
def _unpacked(path: str | Path) -> Iterator[tuple[BinaryIO | gzip.GzipFile, int | None]]:
    """Opens an IDX file; yields its unpacked content, and the size of the file in bytes or None if it is compressed.

    Raises:
        DataError: the file cannot be opened; or the compression is damaged, or a read fails within the context.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            # A small compressed file may hold any amount: no more is unpacked than the header says.
            yield (gzip.GzipFile(fileobj=file), None) if is_packed else (file, size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is truncated or corrupt: {error}") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_shape(stream: BinaryIO | gzip.GzipFile, path: Path) -> tuple[int, ...]:
    """Reads the header from the unpacked content of the file ``path``."""
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\x00\x00" or start[3] == 0:
        # gzip raises its own error if the file is damaged.
        stream.read(_LOOK_AHEAD)
        raise DataError(f"{path} is not an IDX file: it starts with {start.hex() or 'nothing'}")
    if start[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} holds IDX type 0x{start[2]:02x}, expected unsigned bytes (0x08)")
    packed_sizes = stream.read(4 * start[3])
    if len(packed_sizes) < 4 * start[3]:
        raise DataError(
            f"{path} is truncated: {4 + len(packed_sizes)} bytes, its header alone takes {4 + 4 * start[3]}"
        )
    return struct.unpack(f">{start[3]}I", packed_sizes)


def _read(stream: BinaryIO | gzip.GzipFile, size: int | None, max_bytes: int, path: Path) -> Tensor:
    """Reads the header, rejects a size that differs from `size` or is above `max_bytes`, and reads the values.

    Args:
        stream: the unpacked content.
        size: the size of the file in bytes; None for a compressed file.
        max_bytes: the largest accepted size in bytes.
        path: the path of the file, for the message of an error.
    """
    sizes = _read_shape(stream, path)
    header = 4 + 4 * len(sizes)
    expected = header + math.prod(sizes)
    if size is not None and size != expected:
        raise _wrong_size(path, f"{size} bytes", size < expected, sizes, expected)
    if expected > max_bytes:
        raise DataError(f"{path} is too large: its header (shape {sizes}) says {expected} bytes, more than {max_bytes}")
    values = bytearray(stream.read(expected - header))
    # gzip checks its checksum when it reads past the end.
    if len(values) != expected - header or stream.read(1):
        is_short = len(values) < expected - header
        found = f"{header + len(values)} bytes" if is_short else f"more than {expected} bytes"
        raise _wrong_size(path, found, is_short, sizes, expected)
    try:
        tensor = torch.frombuffer(values, dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)
        return tensor.reshape(sizes)
    except RuntimeError as error:
        # A shape without values may have sizes that no tensor can have.
        raise DataError(f"{path}: its header says the shape {sizes}, which no tensor can have") from error


def _wrong_size(path: Path, found: str, is_short: bool, sizes: tuple[int, ...], expected: int) -> DataError:
    problem = "truncated" if is_short else "too long"
    return DataError(f"{path} is {problem}: {found}, its header (shape {sizes}) says {expected}")
