"""Facts about the installed torch, which are read from its files as long as nothing has imported it.

The import of torch takes a second, which a command that only asks for the build of the kernels need not wait for.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any


def version() -> str:
    """Returns the version of torch with its local part, such as ``2.13.0+cpu``.

    Raises:
        ImportError: torch is not installed.
    """
    return str(_facts()["__version__"])


def git_version() -> str | None:
    """Returns the commit that torch was built from; None if torch does not say."""
    return _facts().get("git_version")


def cuda_version() -> str | None:
    """Returns the version of CUDA that torch was built for, such as ``12.6``; None for a CPU build."""
    return _facts().get("cuda")


def _facts() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    loaded = getattr(torch, "version", None)
    return _read_facts() if loaded is None else vars(loaded)


@cache
def _read_facts() -> dict[str, Any]:
    found = importlib.util.find_spec("torch")
    places = [] if found is None else list(found.submodule_search_locations or [])
    if not places:
        raise ImportError("torch is not installed", name="torch")
    # A file of assignments alone, which torch itself imports.
    return runpy.run_path(str(Path(places[0]) / "version.py"))
