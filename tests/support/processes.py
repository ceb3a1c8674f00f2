"""Looks at processes, and waits for what they do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen, seconds: float = 60) -> None:
    """Waits until ``condition()`` is true; fails after ``seconds``, or when one of the processes has ended."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that has ended and was not waited for yet counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started and whose end it has not waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def servers_of(pid: int) -> list[int]:
    """Returns the parameter servers that a process has started."""
    found = []
    for child in children(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lightkit.parameter_server" in words:
            found.append(child)
    return found
