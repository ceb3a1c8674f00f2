"""The memory that this process has used at most, and that it may still use."""

from __future__ import annotations

import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """Returns the largest number of bytes that this process had in memory so far; 0 on systems without the number."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def available_memory() -> int | None:
    """Returns the bytes that the system and the limits of a container leave; None on systems without the number."""
    found: list[int] = []
    try:
        fields = (line.split() for line in _MEMINFO.read_text().splitlines())
        found += [int(words[1]) << 10 for words in fields if words[:1] == ["MemAvailable:"]]
    except (OSError, ValueError, IndexError):
        pass
    try:
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - used))
    except (OSError, ValueError):
        # Without a limit the file has the word max.
        pass
    return min(found, default=None)
