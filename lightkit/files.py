"""Writing files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file with what ``write`` puts into the stream it is given.

    The new content goes to a temporary file in the same directory, reaches the disk, and takes the name in one
    rename. If anything fails, a full disk included, the file that was there is untouched.

    Args:
        path: the file; its directory is made if it is not there.
        write: gets a binary stream.

    Raises:
        OSError: the directory cannot be written, the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Removes what `write_atomically` left of files of such names below a directory when it was killed.

    Nobody must be writing one of them.
    """
    for path in directory.rglob(f".{pattern}.????????"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    # The only way to read it is to set it; the mode of a temporary file is stricter than the user asked for.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
