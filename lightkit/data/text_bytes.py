"""The bytes of a text as tensors: mapped from the disk, joined in the cache directory, or in memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightkit._util.regular_files import open_regular
from lightkit.data.cache import cache_path, is_trusted, store, warn_of_rebuild
from lightkit.data.text_files import File
from lightkit.errors import DataError

# The byte between two joined files. It occurs in no text.
SEPARATOR = b"\0"

# Bytes that are read from a file at once.
_CHUNK = 1 << 20

# The limit in bytes of a text that is held in memory.
_MAX_IN_MEMORY = 1 << 30


def size_of(path: Path) -> int:
    """Returns the size of a file in bytes.

    Raises:
        DataError: the file cannot be read or is no regular file.
    """
    if not path.exists():
        raise DataError(f"there is no text at {path}")
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def map_file(path: Path, size: int) -> Tensor:
    """Returns the bytes of a file as a memory-mapped tensor, uint8 ``(size)``."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    with open_regular(path) as file:
        # The system reserves no memory for a mapping that is only read.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns. Batches are copies, and no code writes into the windows.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def join_files(parts: list[list[File]]) -> list[Tensor]:
    """Returns the joined bytes of the files of each part, memory-mapped from a file of the cache directory.

    The function writes that file first if it is missing, damaged or not trusted. If the file cannot be written, the
    bytes are in memory.
    """
    # One digest names the cached file, the other is that of its content.
    digest, whole = hashlib.sha256(), hashlib.sha256()
    for part in parts:
        for index, file in enumerate(part):
            digest.update(f"{file.name}\n{file.size}\n".encode("utf-8", "surrogateescape"))
            whole.update(SEPARATOR if index else b"")
            for chunk in _read(file):
                digest.update(chunk)
                whole.update(chunk)
        digest.update(b"end of part\n")
    sizes = _sizes(parts)
    cached = cache_path(f"text-{digest.hexdigest()[:16]}.bin")
    is_whole = is_trusted(cached)
    if is_whole and _digest(cached) != whole.digest():
        warn_of_rebuild(cached, "it is damaged")
        is_whole = False
    if not is_whole:
        try:
            store(cached, lambda stream: _write_joined(stream, parts))
        except DataError:
            raise
        except OSError as error:
            warnings.warn(f"the joined text is held in memory, because it cannot be kept: {error}", stacklevel=2)
            joined = bytearray().join(_joined(parts))
            return list(torch.frombuffer(joined, dtype=torch.uint8).split(sizes))
    return list(map_file(cached, sum(sizes)).split(sizes))


def join_in_memory(parts: list[list[File]], root: Path) -> list[Tensor]:
    """Returns the joined bytes of the files of each part, in memory.

    Raises:
        DataError: the files of the folder ``root`` are too large together.
    """
    sizes = _sizes(parts)
    _check_size(root, sum(sizes))
    return list(torch.frombuffer(bytearray().join(_joined(parts)), dtype=torch.uint8).split(sizes))


def read_whole(path: Path) -> Tensor:
    """Reads a file into memory, as a uint8 tensor.

    Raises:
        DataError: the file cannot be read or is too large.
    """
    _check_size(path, size_of(path))
    with open_regular(path) as file:
        content = bytearray(file.read())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _check_size(root: Path, size: int) -> None:
    if size > _MAX_IN_MEMORY:
        raise DataError(
            f"{root} has {size:,} bytes; a text that a checkpoint chose may have {_MAX_IN_MEMORY:,}, and one that you "
            "name yourself any number: lightkit.evaluate takes it as data_dir=PATH"
        )


def _sizes(parts: list[list[File]]) -> list[int]:
    """Returns the size in bytes of each part after its files are joined."""
    return [sum(file.size for file in part) + max(len(part) - 1, 0) for part in parts]


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def _write_joined(stream: BinaryIO, parts: list[list[File]]) -> None:
    for chunk in _joined(parts):
        stream.write(chunk)


def _joined(parts: list[list[File]]) -> Iterator[bytes]:
    for part in parts:
        for index, file in enumerate(part):
            if index:
                yield SEPARATOR
            yield from _read(file)


def _read(file: File) -> Iterator[bytes]:
    """Yields the content of a file up to the size that it had when it was found.

    Raises:
        DataError: the file cannot be read or has become shorter.
    """
    left = file.size
    try:
        with open_regular(file.path) as stream:
            while left and (chunk := stream.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
    if left:
        raise DataError(f"{file.path} has changed while it was read")
