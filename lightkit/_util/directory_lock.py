"""Locks directories, so that each has one process that writes to it."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

# A look whether a directory is held takes its lock for an instant: so many times, and after so many seconds each, a
# process tries again.
_TRIES = 4
_PAUSE = 0.02

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
    for _ in range(_TRIES):
        if (is_locked := _lock(descriptor)) is not False:
            break
        time.sleep(_PAUSE)
    if not is_locked:
        os.close(descriptor)
        return is_locked is None
    _held[directory] = descriptor
    return True


def _lock(descriptor: int) -> bool | None:
    """Locks an open directory; returns False if another process has the lock, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def release(directory: Path) -> None:
    """Releases the lock of `hold` on ``directory``; does nothing if this process does not hold the directory."""
    if (descriptor := _held.pop(directory.resolve(), None)) is not None:
        os.close(descriptor)


def is_held_by_another(directory: Path) -> bool:
    """Returns True if another process holds ``directory``: see `hold`."""
    return directory.resolve() not in _held and is_held(directory)


def is_held(directory: Path) -> bool:
    """Returns True if a process, this one included, holds ``directory``: see `hold`.

    A directory that cannot be opened counts as not held.
    """
    if directory.resolve() in _held:
        return True
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(descriptor) is False
    finally:
        os.close(descriptor)
