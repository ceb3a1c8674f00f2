"""Watches what code does to the world: files, sockets, processes, imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Audit events that are an act on the world, by their beginnings. Reading a file is one, too.
_ACTS = (
    "builtins.input",
    "ctypes.dlopen",
    "exec",
    "ftplib.",
    "glob.glob",
    "http.client.",
    "import",
    "open",
    "os.",
    "pty.spawn",
    "shutil.",
    "socket.",
    "sqlite3.connect",
    "subprocess.Popen",
    "tempfile.",
    "urllib.Request",
    "webbrowser.open",
)

# Packages that anything built from a checkpoint may import, and nothing else beyond Python's own library.
_PACKAGES = ("lightkit", "lightning", "numpy", "torch", "torchmetrics")

_watching: list[list[str]] = []


def _hook(event: str, arguments: tuple) -> None:
    if not _watching or not event.startswith(_ACTS):
        return
    if event == "import":
        top = str(arguments[0]).partition(".")[0]
        if top in _PACKAGES or top in sys.stdlib_module_names:
            return
    if event == "exec" or _is_part_of_an_import():
        return
    _watching[-1].append(f"{event}{arguments!r}")


def _is_part_of_an_import() -> bool:
    """Returns True if Python looks for a module or loads it, of which the event ``import`` has told."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("importlib", "zipimport")):
            return True
        frame = frame.f_back
    return False


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the acts within it, of all threads, one text each."""
    acts: list[str] = []
    _watching.append(acts)
    try:
        yield acts
    finally:
        _watching.pop()


def variables_read(monkeypatch) -> list[str]:
    """Collects the names of the environment's variables that are looked at from now on."""
    names: list[str] = []
    inner = os.environ

    class Watched(type(inner)):
        def __getitem__(self, key):
            names.append(key)
            return inner[key]

    environment = Watched.__new__(Watched)
    vars(environment).update(vars(inner))
    monkeypatch.setattr(os, "environ", environment)
    return names
