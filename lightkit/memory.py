"""Keeps the memory of freed tensors in the process, for the next ones."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_TOP_PAD = 64 << 20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has the C library keep what tensors on the CPU give back, instead of returning it to the system.

    A training step frees its activations and asks for as much again at the next. Where the C library has returned
    the memory in between, the system clears every page of it anew, which may take longer than computing what goes
    into it. Afterwards the process holds on to the most memory that it has had in use at a time.

    It holds for the whole process, cannot be undone, and may be called any number of times. ``lightkit.train``
    calls it.

    Returns:
        Whether the C library took the settings: glibc does; others, such as that of macOS or musl, do not know them.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(ctypes.c_int(option), ctypes.c_int(value)) == 1 for option, value in settings])
