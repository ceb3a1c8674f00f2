"""Files of parsed data in the cache directory, which are read only if no other user can write to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lightkit._util.atomic_write import write_atomically
from lightkit._util.cache_dir import cache_root
from lightkit._util.ownership import find_stranger

# The number of bytes in which a file of `store_checked` has the length of its facts.
_LENGTH = 8

_SECONDS_OF_A_DAY = 86_400


def cache_path(name: str) -> Path:
    """Returns the path of the file ``name`` in the cache of parsed data; the file need not exist."""
    return cache_root() / "data" / name


def is_trusted(path: Path) -> bool:
    """Returns True if the file exists and no other user can write to it or to its folder; warns if one can."""
    if not path.is_file():
        return False
    for place in (path, path.parent):
        if (reason := find_stranger(place)) is not None:
            warn_of_rebuild(path, f"{place} {reason}" if place != path else reason)
            return False
    return True


def warn_of_rebuild(path: Path, reason: str) -> None:
    """Warns that the file ``path`` of the cache is not used but made again, for ``reason``."""
    warnings.warn(f"{path} is not used, and made again: {reason}", stacklevel=3)


def store(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file of the cache atomically, with mode 0644.

    Args:
        path: a path from `cache_path`.
        write: a function that writes the content into its argument, a binary stream.

    Raises:
        OSError: the file cannot be written, or another user can write to its directory.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (reason := find_stranger(path.parent)) is not None:
        raise PermissionError(f"{path.parent} {reason}; chmod go-w it, or set LIGHTKIT_CACHE_DIR to one of yours")
    write_atomically(path, write, mode=0o644)


def store_checked(path: Path, facts: Any, content: Any = b"") -> None:
    """Writes a file that `load_checked` reads: a SHA-256 digest, the length of the facts, the facts, the content.

    Args:
        path: a path from `cache_path`.
        facts: values that JSON can hold.
        content: an object with a contiguous buffer of bytes.

    Raises:
        OSError: as in `store`.
    """
    head = json.dumps(facts).encode()
    # A view without elements cannot be cast.
    body = memoryview(content).cast("B") if len(content) else b""
    parts = (len(head).to_bytes(_LENGTH, "little"), head, body)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)

    def write(stream: BinaryIO) -> None:
        for part in (digest.digest(), *parts):
            stream.write(part)

    store(path, write)


def remove_unused(pattern: str, days: float) -> None:
    """Removes the files of the cache that nobody has read or written for some days.

    A process that has such a file open continues to read it.

    Args:
        pattern: the pattern of their names.
        days: the number of days.
    """
    begin = time.time() - days * _SECONDS_OF_A_DAY
    for path in cache_path(pattern).parent.glob(pattern):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < begin:
                path.unlink()


def load_checked(path: Path) -> tuple[Any, memoryview] | None:
    """Returns the facts and the content of a file of `store_checked`, which processes share in memory.

    Returns:
        The facts and the content, a view that can be written to without a change of the file; None if the file is
        missing, or with a warning if it is damaged or another user could have written it.
    """
    if not is_trusted(path):
        return None
    begin = hashlib.sha256().digest_size
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > begin + _LENGTH:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            if hashlib.sha256(mapped[begin:]).digest() == mapped[:begin]:
                with contextlib.suppress(OSError):
                    # The time of the last use: see `remove_unused`.
                    os.utime(path)
                start = begin + _LENGTH
                end = start + int.from_bytes(mapped[begin:start], "little")
                return json.loads(bytes(mapped[start:end])), mapped[end:]
    warn_of_rebuild(path, "it is damaged")
    return None
