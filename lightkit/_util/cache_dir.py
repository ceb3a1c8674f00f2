"""The directory of the files that lightkit makes once and uses often."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Returns ``$LIGHTKIT_CACHE_DIR``, or else ``lightkit`` in the user's cache directory."""
    if chosen := os.environ.get("LIGHTKIT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightkit"
