"""Opens regular files only; a pipe or a device may have no end, or block its reader for ever."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightkit._util.printable import few
from lightkit.errors import DataError

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
    except FileNotFoundError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}{kind_of_missing(path)}") from error
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


def kind_of_missing(path: str | Path) -> str:
    """Returns ": it is a broken link to TARGET" if ``path``, which does not exist, is a link; else ""."""
    return f": it is a broken link to {os.readlink(path)}" if os.path.islink(path) else ""


def warn_of_skipped(paths: Sequence[Path]) -> None:
    """Warns in one line that ``paths``, entries of a folder such as broken links, pipes or devices, are skipped."""
    if paths:
        shown = few([f"{path} ({_kind_of(path)})" for path in paths])
        warnings.warn(f"skipped, since they are no files that can be read: {shown}", stacklevel=3)


def _kind_of(path: Path) -> str:
    """Returns what ``path`` is, if it is no file that can be read, such as "a pipe" or "a broken link"."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "a broken link" if os.path.islink(path) else str(error.strerror or error)
    return _kind(mode)


def _kind(mode: int) -> str:
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")


def _check_kind(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        raise DataError(f"{name} is {_kind(mode)}, and must be a regular file")
