"""Checks that only this user could have written a file or a directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def find_stranger(path: Path, follow_links: bool = True) -> str | None:
    """Returns a clause about the path that says how other users could write to it, or None if they could not.

    Raises:
        OSError: the path does not exist, or cannot be read.
    """
    info = os.stat(path, follow_symlinks=follow_links)
    # Root can do anything to this process anyway, and owns what an image was built with.
    if info.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {info.st_uid})"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None
