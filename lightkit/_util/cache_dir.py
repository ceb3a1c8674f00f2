"""The cache directory of lightkit."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Returns the path of the cache directory, which may not exist.

    The directory is ``$LIGHTKIT_CACHE_DIR``, else ``$XDG_CACHE_HOME/lightkit``, else ``~/.cache/lightkit``.
    """
    if chosen := os.environ.get("LIGHTKIT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightkit"
