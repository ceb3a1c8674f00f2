"""Atomic writes, after which a file has the old content or the whole new one."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# The names of the temporary files of `write_atomically`, for the kinds of files in the directory of a run.
_LEFTOVER = re.compile(r"\..+\.(ckpt|csv|html|json|png|yaml)\.[a-z0-9_]{8}")


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], mode: int = 0o666) -> None:
    """Replaces the content of a file atomically by what ``write`` writes.

    The function writes the new content to a temporary file in the same directory, flushes the file to the disk and
    renames it to ``path``. If anything fails, a full disk included, the old file is untouched. If ``path`` is a device,
    a pipe or a socket, the function writes to it directly.

    Args:
        path: the file; the function makes its directory if it is missing.
        write: a function that receives a binary stream and writes the new content to it.
        mode: the permissions of the file, from which the umask is subtracted.

    Raises:
        OSError: the directory is not writable, or the disk is full.
    """
    path = Path(path)
    if _is_no_file(path):
        with open(path, "wb") as stream:
            write(stream)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replaces the content of the file ``path`` by ``text`` in UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda stream: stream.write(text.encode("utf-8", "surrogateescape")))


def remove_leftovers(directory: Path) -> None:
    """Removes the temporary files that `write_atomically` left in the directory of a run when its process was killed.

    The function does not enter the directories of other runs below it, which have a ``.hydra`` of their own.

    Args:
        directory: the directory of the run; no process may be writing to it.
    """
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not os.path.isdir(os.path.join(folder, name, ".hydra"))]
        for name in filter(_LEFTOVER.fullmatch, names):
            Path(folder, name).unlink(missing_ok=True)


def _is_no_file(path: Path) -> bool:
    """Returns True if ``path`` is a device, a pipe or a socket, or a link to one."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _umask() -> int:
    # The umask is read by setting it. A temporary file has a stricter mode than the user asked for.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
