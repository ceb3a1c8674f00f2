"""The image files below a folder, and what else lies there."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightkit._util.litter import is_litter
from lightkit._util.printable import few, printable
from lightkit._util.regular_files import warn_of_skipped
from lightkit.errors import DataError

_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".dib", ".gif")


@dataclass(frozen=True)
class ImageFile:
    """A file of an image.

    Attributes:
        path: the path of the file.
        name: its path within the folder that was searched, with slashes.
        size: its size in bytes.
        modified: the time of its last change in nanoseconds.
    """

    path: Path
    name: str
    size: int
    modified: int


@dataclass
class Walk:
    """The entries below a folder.

    Attributes:
        files: the image files, sorted by name.
        others: the names of the entries that are no images, sorted; those of folders end with a slash.
        unreadable: broken links, pipes and devices whose names have the suffix of an image.
    """

    files: list[ImageFile] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Returns True for the name of an entry that no user has put among images: a hidden one, or litter of a program."""
    return name.startswith(".") or name == "__pycache__" or is_litter(name)


def walk_images(root: Path, prefix: str = "") -> Walk:
    """Finds the images in a folder and in the folders below it.

    The suffix decides, in capital or small letters: .png, .jpg, .tif, .webp, .bmp, .gif and their variants. Links to
    files and to folders are followed; of a file with several links, one is taken. Hidden folders and folders of litter,
    such as ``__MACOSX``, are not entered.

    Args:
        root: the folder.
        prefix: a string before the name of each file, such as ``train/``.

    Raises:
        DataError: a folder cannot be read.
    """
    found = Walk()
    seen: set[tuple[int, int]] = set()
    for path, name, is_folder in _entries(root, prefix, seen):
        if is_folder or path.suffix.lower() not in _SUFFIXES or is_hidden(path.name):
            found.others.append(name + ("/" if is_folder else ""))
            continue
        try:
            status = path.stat()
        except OSError:
            found.unreadable.append(path)
            continue
        if not stat.S_ISREG(status.st_mode):
            found.unreadable.append(path)
        elif (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            found.files.append(ImageFile(path, name, status.st_size, status.st_mtime_ns))
    found.files.sort(key=lambda file: file.name)
    found.others.sort()
    found.unreadable.sort()
    return found


def _entries(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str, bool]]:
    """Yields the path and the name of each file, sorted; and of each folder that is not entered, which has True."""
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{printable(str(folder))} cannot be read: {error.strerror or error}") from error
    # Links to folders may form a cycle.
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        path, name = Path(entry.path), prefix + entry.name
        if not _is_folder(entry):
            yield path, name, False
        elif is_hidden(entry.name):
            yield path, name, True
        else:
            yield from _entries(path, f"{name}/", seen)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def warn_of_others(root: Path, others: Sequence[str], unreadable: Sequence[Path]) -> None:
    """Warns in one line of the entries of a folder that are no images, and in another of those that cannot be read."""
    warn_of_skipped(unreadable)
    if others:
        count = "1 entry that is no image" if len(others) == 1 else f"{len(others)} entries that are no images"
        warnings.warn(f"{printable(str(root))}: skipped {count}: {few(list(others))}", stacklevel=3)
