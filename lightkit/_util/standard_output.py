"""Standard output that any terminal and any reader can take: it raises no error for a character or a closed pipe."""

from __future__ import annotations

import io
import sys


class _Pipe(io.FileIO):
    """A file that drops what is written to it after its reader has gone, as after ``| head -1``."""

    def write(self, data) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride] (any buffer)
        """Writes ``data`` and returns the number of bytes."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(memoryview(data).cast("B"))


def make_tolerant() -> None:
    """Makes ``sys.stdout`` and ``sys.stderr`` escape characters that they cannot encode, and outlive their reader.

    A program that prints its results would otherwise end in an error before it has written them, or in the middle of a
    training. A full disk still raises an error. The function leaves streams alone that are no files, and the error
    handler of a stream for which somebody has chosen one.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper or not isinstance(stream.buffer, (io.BufferedWriter, io.FileIO)):
            continue
        stream.flush()
        # The old stream, which Python keeps in sys.__stdout__, owns the file descriptor.
        file = _Pipe(stream.fileno(), "wb", closefd=False)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                # `python -u` has no buffer.
                file if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(file),  # pyright: ignore
                encoding=stream.encoding,
                errors="backslashreplace" if stream.errors == "strict" else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            ),
        )
