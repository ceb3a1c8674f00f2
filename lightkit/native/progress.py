"""The progress of a build on standard error: a progress bar on a terminal, else one line at the start."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

_WIDTH = 24


@dataclass
class Progress:
    """The progress of a build.

    Attributes:
        done: the number of finished steps.
        total: the number of all steps; 0 before the build has started.
        started: the `time.monotonic` of the start.
        seconds: the duration in seconds; None before the build has finished.
    """

    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None

    def __str__(self) -> str:
        if self.total == 0:
            return "starting"
        filled = _WIDTH * self.done // self.total
        bar = "#" * filled + "." * (_WIDTH - filled)
        return f"[{bar}] {self.done}/{self.total}" + (f", about {left:.0f} s left" if (left := self.left) else "")

    @property
    def left(self) -> float | None:
        """The estimated seconds until the end, from the mean time of the finished steps.

        None before the first step and after the last one.
        """
        if not 0 < self.done < self.total:
            return None
        return (time.monotonic() - self.started) * (self.total - self.done) / self.done


class ProgressLine:
    """A line on standard error: a progress bar after ``text`` on a terminal; elsewhere ``text`` alone, once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._drawn = 0
        self._on_terminal = sys.stderr.isatty()
        print(text, file=sys.stderr, end="" if self._on_terminal else "\n", flush=True)

    def draw(self, progress: Progress) -> None:
        """Redraws the line with ``progress``; does nothing without a terminal."""
        if self._on_terminal:
            line = f"{self._text} {progress}"
            print(f"\r{line:<{self._drawn}}", file=sys.stderr, end="", flush=True)
            self._drawn = len(line)

    def close(self) -> None:
        """Ends the line on a terminal."""
        if self._on_terminal:
            print(file=sys.stderr, flush=True)
