"""Opens regular files only; a pipe or a device may have no end, or block its reader for ever."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightkit._util.printable import printable
from lightkit.errors import DataError

# The number of names that a warning shows.
_SHOWN = 3

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | Path, most: int | None = None, name: str | None = None) -> BinaryIO:
    """Opens a file for reading, if it is a regular one and not too large.

    The stream ends at the size that the file had when it was opened: the file may grow meanwhile, and some files of the
    system have size 0 and no end.

    Args:
        path: the file; links are followed.
        most: the largest allowed size in bytes; None for no limit.
        name: the name of the file in messages; None for its path.

    Raises:
        DataError: the file does not exist, cannot be opened, is not regular, or is too large.
    """
    name = str(path) if name is None else name
    try:
        # The kind is checked before the file is opened, since opening a device may have effects, and again below, since
        # another process may have replaced the file in between.
        _check_kind(os.stat(path).st_mode, name)
        raw = _Bounded(path, "rb", opener=_open_without_waiting)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
    file = io.BufferedReader(raw)
    try:
        status = os.fstat(file.fileno())
        raw.end = status.st_size
        _check_kind(status.st_mode, name)
        if most is not None and status.st_size > most:
            raise DataError(f"{name} has {status.st_size:,} bytes, and no more than {most:,} are read")
    except BaseException:
        file.close()
        raise
    return file


class _Bounded(io.FileIO):
    """A file whose content ends at the byte ``end``."""

    end = 0

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")
        return super().readinto(room[: max(0, self.end - self.tell())])

    def readall(self) -> bytes:
        return self.read(max(0, self.end - self.tell())) or b""

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.end - self.tell())
        return super().read(left if size < 0 else min(size, left)) or b""


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def warn_of_skipped(paths: Sequence[Path]) -> None:
    """Warns in one line that ``paths``, entries of a folder such as broken links, pipes or devices, are skipped."""
    if paths:
        shown = ", ".join(printable(str(path)) for path in paths[:_SHOWN])
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        warnings.warn(f"skipped, since they are no files that can be read: {shown}{more}", stacklevel=3)


def _check_kind(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
        raise DataError(f"{name} is {kind}, and must be a regular file")
