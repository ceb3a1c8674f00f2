"""SIGTERM as an exception, so that a process ends its own processes before it ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightkit.errors import Terminated


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Raises `Terminated` in the main thread on SIGTERM within the context; by default SIGTERM ends the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
