r"""Copies what a process prints to a file, as lines of text without the escape codes of a terminal.

A progress bar on a terminal rewrites its lines: it moves the cursor up, erases them and prints them anew. The file gets
a line when it will no longer be erased.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

# The escape codes of a terminal: those with parameters, those that end with a bell, and those of two characters.
_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_=>])")

# What moves the cursor to the beginning of a line or up, and erases lines.
_REWRITE = re.compile(r"(?:\r(?!\n)|\x1b\[\d*[AGK])+")
_UP = re.compile(r"\x1b\[(\d*)A")

# Control characters other than the ends of lines and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_active: list[OutputLog] = []


def log_only(line: str) -> None:
    """Writes a line to the innermost open `OutputLog`, and prints nothing; without one the function does nothing."""
    if _active:
        _active[-1].write(line + "\n")


class OutputLog:
    """A context that copies standard output and standard error of this process to a file.

    What is printed before `open` is kept until then, and dropped if `open` is never called. If an error ends the
    context, the file gets its traceback. A file that cannot be written, as on a full disk, ends no program: the log
    stops there.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._kept: list[str] = []
        # The last lines, which the next print may go on with or erase.
        self._pending = ""
        self._return = ""
        self._streams: dict[str, Any] = {}

    def __enter__(self) -> OutputLog:
        _active.append(self)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None:
                self._streams[name] = (stream, copy := _Copy(stream, self._print))
                setattr(sys, name, copy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        for name, (stream, copy) in self._streams.items():
            copy.close_copy()
            # A program may have replaced the stream since.
            if getattr(sys, name) is copy:
                setattr(sys, name, stream)
        self._commit(self._pending)
        if isinstance(error, Exception):
            self.write("".join(traceback.format_exception(kind, error, trace)))
        elif kind is not None:
            self.write(f"ended by {kind.__name__}\n")
        self._kept.clear()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def open(self, path: Path) -> None:
        """Begins to append to the file at ``path``."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A line is in the file as soon as it is printed: a kill loses none.
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        kept, self._kept = self._kept, []
        for text in kept:
            self.write(text)

    def write(self, text: str) -> None:
        """Appends ``text`` to the file, without escape codes."""
        if self._file is None:
            self._kept.append(text)
            return
        plain = _CONTROL.sub("", _CODE.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))
        try:
            self._file.write(plain)
        except (OSError, ValueError):
            self._file = None

    def _print(self, text: str) -> None:
        """Takes what the program prints."""
        # Whether a return erases the line shows in the next character, which `print` writes on its own.
        text = self._return + text
        self._return = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r")
        parts = _REWRITE.split(text)
        self._append(parts[0])
        for codes, part in zip(_REWRITE.findall(text), parts[1:], strict=True):
            erased = 1 + sum(int(count or 1) for count in _UP.findall(codes))
            lines = self._pending.split("\n")
            self._commit("\n".join(lines[:-erased]))
            # A bar of several lines erases all of them: they wait, except if the text ends with a line.
            self._pending = ""
            if part.endswith("\n"):
                self._append(part)
            else:
                self._pending = part

    def _append(self, text: str) -> None:
        whole, end, rest = (self._pending + text).rpartition("\n")
        if text and end:
            self._commit(whole)
            self._pending = rest
        else:
            self._pending += text

    def _commit(self, lines: str) -> None:
        if _CODE.sub("", lines).strip():
            self.write(lines + "\n")


class _Copy:
    """A text stream that hands what is written to it to a function too; everything else is the stream's own."""

    def __init__(self, stream: TextIO, receive: Callable[[str], None]) -> None:
        self._stream = stream
        self._receive: Callable[[str], None] | None = receive

    def write(self, text: str) -> int:
        """Writes ``text`` to the stream and returns its length."""
        written = self._stream.write(text)
        if self._receive is not None:
            self._receive(text)
        return written

    def writelines(self, lines: Any) -> None:
        """Writes each of ``lines``."""
        for line in lines:
            self.write(line)

    def close_copy(self) -> None:
        """Makes the object the stream alone; a logging handler may keep it after the end of the log."""
        self._receive = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
