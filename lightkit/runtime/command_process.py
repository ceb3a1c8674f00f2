"""The process of a command, which skips garbage collection during imports and the destruction of objects at its end.

While modules are imported, Python's cyclic garbage collector walks all objects so far, again and again, and finds
nothing to free. At the end the interpreter destroys all of them, one by one. Together that takes longer than the
training of a small model.
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

from lightkit._util import lazy_imports, standard_output
from lightkit.errors import ConfigError

# The types that `open` returns for a file that is open for writing.
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)

# The status with which Python ends when its standard output cannot be written.
_UNWRITTEN = 120

# The number of new objects between two collections; with Python's default the collector would run a hundred times while
# the report imports its libraries. Tensors, which are large, are freed without the collector.
_THRESHOLD = 20_000

_collects_later = False


def run_as_process(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` as the only task of this process, and ends the process with its exit status.

    A module that `lazy_imports` defers is imported at its first use. Garbage collection is off until
    `begin_to_collect`. Standard output escapes characters that it cannot encode, and a closed pipe is no error.

    Args:
        main: the entry point of a command. It returns the exit status (None for 0), or raises SystemExit as `sys.exit`
            does. A `ConfigError` is printed and gives status 1.
    """
    global _collects_later
    _collects_later = True
    gc.disable()
    standard_output.make_tolerant()
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
    """Starts the cyclic garbage collector, which `run_as_process` has stopped, for objects made from now on.

    A command calls the function after its imports. In a process without `run_as_process` the function does nothing.
    """
    global _collects_later
    if _collects_later:
        _collects_later = False
        gc.freeze()
        gc.set_threshold(_THRESHOLD)
        gc.enable()


def _end(status: int) -> NoReturn:
    """Ends the process with exit status ``status`` as Python does, except that it destroys no objects.

    If a buffered file cannot be written, the status is Python's 120 for standard output or standard error.
    """
    # In Python's own order: wait for threads, call the functions registered by `atexit`, write buffered output.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] (private; Python calls it at its end)
    atexit._run_exitfuncs()
    gc.unfreeze()
    for file in [found for found in gc.get_objects() if type(found) in _WRITERS]:
        try:
            if not file.closed:
                file.flush()
        except (OSError, ValueError):
            status = status or (_UNWRITTEN if file in (sys.stdout, sys.stderr) else 0)
    os._exit(status)
