"""Files of parsed data in the cache directory, which are read only if no other user can write to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lightkit._util.atomic_write import write_atomically
from lightkit._util.cache_dir import cache_root
from lightkit._util.ownership import find_stranger


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
