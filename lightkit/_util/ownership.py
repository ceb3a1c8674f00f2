"""A check that only the user of this process, or root, can write to a file or a directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def find_stranger(path: Path, follow_links: bool = True) -> str | None:
    """Returns how other users could write to ``path``, as a clause such as "can be written by other users".

    Args:
        path: the file or directory.
        follow_links: check the target of a symbolic link, not the link itself.

    Returns:
        The clause, without a subject; None if only this user and root can write to ``path``.

    Raises:
        OSError: ``path`` does not exist, or cannot be read.
    """
    info = os.stat(path, follow_symlinks=follow_links)
    # Root can change this process anyway, and owns the files of a container image.
    if info.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {info.st_uid})"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None
