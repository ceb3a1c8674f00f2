"""Data that were parsed once and are kept in the cache directory, for this user alone to believe."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lightkit._util.atomic_write import write_atomically
from lightkit._util.cache_dir import cache_root
from lightkit._util.ownership import find_stranger


def kept_path(name: str) -> Path:
    """Returns where the data of a name are kept, there or not."""
    return cache_root() / "data" / name


def is_kept(path: Path) -> bool:
    """Returns whether data are there that nobody else could have written; says so in a line if others could."""
    if not path.is_file():
        return False
    for place in (path, path.parent):
        if (reason := find_stranger(place)) is not None:
            refuse(path, f"{place} {reason}" if place != path else reason)
            return False
    return True


def refuse(path: Path, reason: str) -> None:
    """Says in a line why data are made anew."""
    warnings.warn(f"{path} is not used, and made anew: {reason}", stacklevel=3)


def keep(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Keeps what ``write`` puts into the stream it is given, for this user alone to write.

    Raises:
        OSError: it cannot be kept, or others could change it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (reason := find_stranger(path.parent)) is not None:
        raise PermissionError(f"{path.parent} {reason}; chmod go-w it, or set LIGHTKIT_CACHE_DIR to one of yours")
    write_atomically(path, write, mode=0o644)
