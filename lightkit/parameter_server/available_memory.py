"""Refuses what the memory of this machine has no room for, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from lightkit.errors import LightkitError


def check_memory(wanted: int) -> None:
    """Checks that so many bytes can be had; systems without ``/proc`` do not say, and are not asked.

    Raises:
        LightkitError: there are not so many.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            if wanted > available:
                raise LightkitError(f"{wanted} bytes are wanted and the server has {available} bytes of memory left")
