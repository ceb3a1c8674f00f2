"""The files of a text in a folder: those that a user has put there, each once."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lightkit._util.litter import is_litter
from lightkit._util.printable import few, printable
from lightkit._util.regular_files import warn_of_skipped
from lightkit.errors import DataError

# Folders of the standard library without code of it. pydoc_data is one file of documentation, a 16th of all bytes.
_EXCLUDED_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data")


@dataclass(frozen=True)
class File:
    """A file of a text.

    Args:
        path: the path of the file.
        name: the path of the file within the folder of the text, with slashes.
        size: the size of the file in bytes.
    """

    path: Path
    name: str
    size: int


def text_files(root: Path, suffix: str = "", without: tuple[str, ...] = ()) -> list[File]:
    """Returns the files in a folder and its subfolders that are neither hidden nor empty, sorted by name, each once.

    One warning names the links to nothing, the pipes and the devices among them. Another one counts and names the files
    and folders that systems and programs leave behind, such as Thumbs.db, which are left out.

    Args:
        root: the folder.
        suffix: the suffix of the names of the files; "" for all files.
        without: the names of the subfolders that are left out, besides ``__pycache__`` and hidden ones.

    Raises:
        DataError: there are no such files, or a file or folder cannot be read.
    """
    found: list[File] = []
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    # os.walk follows no links to folders, which may form a cycle.
    paths: list[Path] = []
    litter: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in (*without, "__pycache__") and name[0] != "."]
        names = [name for name in names if name[0] != "." and name.endswith(suffix)]
        litter += [Path(folder, name) for name in (*folders, *names) if is_litter(name)]
        folders[:] = [name for name in folders if not is_litter(name)]
        paths += [Path(folder, name) for name in names if not is_litter(name)]
    skipped = []
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        try:
            status = path.stat()
        except OSError as error:
            # A dangling link or a cycle of links is skipped.
            if not path.is_symlink() or error.errno not in (errno.ENOENT, errno.ELOOP):
                fail(error)
            skipped.append(path)
            continue
        # A read of a pipe or a device might not end.
        if not stat.S_ISREG(status.st_mode):
            skipped.append(path)
            continue
        if status.st_size == 0 or (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        found.append(File(path, name, status.st_size))
    warn_of_skipped(skipped)
    if litter:
        count = "1 entry" if len(litter) == 1 else f"{len(litter)} entries"
        shown = few(sorted(path.relative_to(root).as_posix() for path in litter))
        warnings.warn(f"{printable(str(root))}: skipped {count} that no user has made: {shown}", stacklevel=2)
    if not found:
        raise DataError(f"{root} holds no text: no file that is neither hidden nor empty")
    return found


def library_files(root: Path) -> list[File]:
    """Returns the Python sources of the standard library in ``root``, without its tests and installed packages."""
    return text_files(root, ".py", _EXCLUDED_FOLDERS)
