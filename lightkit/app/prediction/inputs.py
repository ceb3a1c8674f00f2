"""The images that the key ``input`` of a prediction names: files, folders, several of them, or a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from lightkit._util.printable import printable
from lightkit.data.image_files import find_images
from lightkit.errors import ConfigError, DataError

# The largest number of commas in the name of a file within brackets.
_MAX_COMMAS = 8


def find_inputs(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the image files that an input names, each once.

    A text is the path of a file or of a folder, with all images below it. Only a text that is no existing path may
    have a meaning: ``[A,B,C]`` stands for several paths or patterns, and ``*``, ``?``, ``[...]`` and ``**`` within a
    text for all paths of that pattern, sorted. A sequence has paths alone.

    Args:
        given: the text, a path, or a sequence of paths.

    Raises:
        ConfigError: the brackets are empty, or the sequence is.
        DataError: a path does not exist, or has no images; or no path has the pattern.
    """
    if isinstance(given, Path) or (isinstance(given, str) and os.path.lexists(given)):
        return find_images(Path(given))
    if isinstance(given, str):
        if given.startswith("[") and given.endswith("]"):
            parts = _split(given[1:-1])
        else:
            parts = [given]
        found = [path for part in parts for path in _find(part, alone=parts == [given])]
    else:
        parts = [str(path) for path in given]
        found = [path for part in parts for path in find_images(Path(part))]
    if not parts:
        raise ConfigError("input must name an image, a folder or several of them, got an empty list")
    return list(dict.fromkeys(found))


def _split(text: str) -> list[str]:
    """Returns the elements between brackets; a comma belongs to an element if only so a path of that name exists."""
    pieces, parts, begin = text.split(","), [], 0
    while begin < len(pieces):
        ends = range(min(len(pieces), begin + 1 + _MAX_COMMAS), begin, -1)
        joined = (",".join(pieces[begin:end]) for end in ends)
        taken = next((part for part in joined if _is_path(part.strip())), pieces[begin])
        begin += taken.count(",") + 1
        parts.append(os.path.expanduser(taken.strip()))
    return [part for part in parts if part]


def _is_path(text: str) -> bool:
    return bool(text) and os.path.lexists(os.path.expanduser(text))


def _find(part: str, alone: bool) -> list[Path]:
    """Returns the images of a path or a pattern; ``alone`` is True if the input has no other part."""
    if os.path.lexists(part) or not glob.has_magic(part):
        return find_images(Path(part))
    places = sorted(glob.glob(part, recursive=True))
    if not places:
        name = "input" if alone else "a part of input"
        raise DataError(f"{name}={printable(part)} does not exist, and no path has this pattern")
    found = [path for place in places for path in find_images(Path(place), may_be_empty=len(places) > 1)]
    if not found:
        raise DataError(f"input={printable(part)}: no folder of this pattern holds images")
    return found
