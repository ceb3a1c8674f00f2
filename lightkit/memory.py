"""A setting of the C library that keeps the memory of freed tensors for the next ones."""

from __future__ import annotations

import ctypes
import sys

# The parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_TOP_PAD = 64 << 20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes the C library keep the freed memory of CPU tensors, instead of returning it to the system.

    A training step frees its activations, and the next step allocates as much again. If the C library returns the
    memory in between, the system clears every page again, which may take longer than the computation of the values.
    With this setting the process keeps the largest amount of memory that it has used at a time.

    The setting holds for the whole process and cannot be undone. Further calls change nothing. ``lightkit.train`` calls
    this function.

    Returns:
        True if the C library accepts the settings, as glibc does; False on macOS and with musl, which lack them.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(ctypes.c_int(option), ctypes.c_int(value)) == 1 for option, value in settings])
