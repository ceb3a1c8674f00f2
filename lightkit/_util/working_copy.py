"""Facts about the git repository of the current directory."""

from __future__ import annotations

import os
import subprocess
from typing import Any

# Seconds that git may take; a repository may lie on a slow file system.
_TIMEOUT = 3.0


def git_state() -> dict[str, Any] | None:
    """Returns the commit of the current directory's repository.

    Returns:
        A dict with ``commit`` (the hexadecimal id), ``branch`` (None without one) and ``is_dirty`` (True if tracked
        files differ from the commit); None outside of a repository, before its first commit, or without git.
    """
    # A file system monitor is a program that the repository's own settings name; a lock would disturb other commands.
    command = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.decode("utf-8", "replace").splitlines()
    heads = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch.") and " " in line[2:])
    commit = heads.get("branch.oid", "")
    if result.returncode != 0 or not commit or not all(c in "0123456789abcdef" for c in commit):
        return None
    branch = heads.get("branch.head")
    return {
        "commit": commit,
        "branch": None if branch == "(detached)" else branch,
        "is_dirty": any(not line.startswith("#") for line in lines),
    }
