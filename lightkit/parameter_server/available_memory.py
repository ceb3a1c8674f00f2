"""A check of the available memory before large allocations."""

from __future__ import annotations

from pathlib import Path

from lightkit.errors import LightkitError


def check_memory(required: int) -> None:
    """Rejects an allocation of ``required`` bytes if the system has less available memory.

    The function does nothing on systems without ``/proc/meminfo``.

    Raises:
        LightkitError: fewer than ``required`` bytes are available.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            if required > available:
                raise LightkitError(f"the server needs {required} bytes of memory, and {available} are available")
