"""Locks directories, so that each has one process that writes to it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

# The descriptors by which this process holds directories.
_held: dict[Path, int] = {}


def hold(directory: Path) -> bool:
    """Locks ``directory`` for this process, until `release` or the end of the process.

    The lock excludes only processes that call `hold` too. A second call in the same process changes nothing.

    Returns:
        False if another process holds the directory. True if this process holds it, or the file system has no locks.

    Raises:
        OSError: the directory does not exist or cannot be opened.
    """
    directory = directory.resolve()
    if directory in _held:
        return True
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        os.close(descriptor)
        return True
    _held[directory] = descriptor
    return True


def release(directory: Path) -> None:
    """Releases the lock of `hold` on ``directory``; does nothing if this process does not hold the directory."""
    if (descriptor := _held.pop(directory.resolve(), None)) is not None:
        os.close(descriptor)


def is_held_by_another(directory: Path) -> bool:
    """Returns True if another process holds ``directory``: see `hold`."""
    if directory.resolve() in _held:
        return False
    if not hold(directory):
        return True
    release(directory)
    return False
