"""Begins and ends the process of a command: what takes time there and computes nothing is left out.

While modules are imported, Python's cyclic garbage collector walks everything that has been imported so far, again and
again, and finds nothing to free. At the end the interpreter takes all of it apart, object by object. Together that is
longer than the training of a small model.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from lightkit._util import lazy_imports
from lightkit.errors import ConfigError

# What `open` makes of a file that is written to.
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)

# The status with which Python ends when its standard output cannot be written.
_UNWRITTEN = 120

# Objects that come before the collector looks at them; Python's own default would have it look a hundred times while
# the report imports what it draws with. What is large, tensors, is freed without the collector.
_THRESHOLD = 20_000

_collects_later = False


def run_as_process(main: Callable[[], int | None]) -> NoReturn:
    """Runs the entry point of a command in a process that is there for it alone, and ends the process.

    Args:
        main: returns the exit status, or raises SystemExit as `sys.exit` does.
    """
    global _collects_later
    _collects_later = True
    gc.disable()
    try:
        lazy_imports.defer()
        status = main()
    except ConfigError as error:
        status = f"error: {error}"
    except SystemExit as error:
        status = error.code
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    _end(status or 0)


def begin_to_collect() -> None:
    """Ends the time of imports in the process of a command: the collector works from now on, on what comes from now on.

    Elsewhere, in a program that imports lightkit, it does nothing.
    """
    global _collects_later
    if _collects_later:
        _collects_later = False
        gc.freeze()
        gc.set_threshold(_THRESHOLD)
        gc.enable()


def _end(status: int) -> NoReturn:
    """Ends the process as Python does, except that memory is left to the operating system."""
    # In Python's own order: threads that are waited for, what was registered for the end, what is still to be written.
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.unfreeze()
    for file in [found for found in gc.get_objects() if type(found) in _WRITERS]:
        try:
            if not file.closed:
                file.flush()
        except (OSError, ValueError):
            status = status or (_UNWRITTEN if file in (sys.stdout, sys.stderr) else 0)
    os._exit(status)
