"""The classes and the sets of a folder of images, by the names of its folders."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightkit._util.printable import few, printable
from lightkit._util.regular_files import kind_of_missing
from lightkit.data.advice import advise
from lightkit.data.image_decoder import FORMATS
from lightkit.data.image_walk import ImageFile, Walk, is_hidden, walk_images, warn_of_others
from lightkit.errors import DataError
from lightkit.targets import nearest

# The names of the folders of the three sets, in small letters.
_SET_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SETS = tuple(_SET_NAMES)


@dataclass(frozen=True)
class LabelledFile:
    """An image file and the index of its class."""

    file: ImageFile
    label: int


@dataclass
class ImageTree:
    """The content of a folder of images.

    Attributes:
        classes: the names of the classes.
        sets: the files of the sets ``train``, ``validation`` and ``test``, sorted by name.
        split: the sets that the folder does not have, and that are split off its training set.
    """

    classes: tuple[str, ...]
    sets: dict[str, list[LabelledFile]]
    split: list[str] = field(default_factory=list)


def read_tree(
    root: Path, validation_share: float, test_share: float, classes: Sequence[str] | None = None
) -> ImageTree:
    """Finds the classes and the images of a folder.

    The folder has a folder for each class, or the folders ``train``, ``val`` (or ``valid``, ``validation``) and
    ``test`` with a folder for each class. A set without a folder is split off the training set: of each class, the
    files whose names have the lowest hash values, so that the split is the same on every machine and a new file
    changes it little. Each warning is one line.

    Args:
        root: the folder.
        validation_share: the share of the training set for a validation set that has no folder, from 0 to 1.
        test_share: the share for the test set.
        classes: the names of the classes in their order; other folders are left out. None takes all folders with
            images, sorted.

    Raises:
        DataError: the folder does not exist or has no classes, fewer than two of them, or a class in one set alone.
    """
    folders = _set_folders(root)
    walks = {name: _walk_classes(root, folder) for name, folder in folders.items()}
    by_class = {name: {key: walk for key, walk in walks[name].items() if walk.files} for name in walks}
    first = "train" if "train" in folders else next(iter(folders))
    named = tuple(sorted(by_class[first])) if classes is None else tuple(classes)
    for name, found in by_class.items():
        unknown = sorted(set(found).difference(named))
        if unknown and classes is None:
            place = (folders[name] / unknown[0]).relative_to(root)
            raise DataError(
                f"{_shown(root)}: {_shown(place)} is no class of {folders[first].name}{nearest(unknown[0], named)}"
            )
        if unknown:
            warnings.warn(f"{_shown(root)}: left out folders that are no class: {few(unknown)}", stacklevel=2)
    if classes is None:
        _check_classes(folders[first], named, walks[first])
    for name, folder in folders.items():
        _warn_of_leftovers(folder, walks[name])
    sets = {
        name: [LabelledFile(file, label) for label, key in enumerate(named) for file in _files(by_class[name], key)]
        for name in by_class
    }
    split = [name for name in ("test", "validation") if name not in sets]
    if "train" in sets:
        shares = {"validation": validation_share, "test": test_share}
        sets |= _split(sets["train"], {name: shares[name] for name in split})
    return ImageTree(named, {name: sets.get(name, []) for name in SETS}, split)


def _files(walks: dict[str, Walk], key: str) -> list[ImageFile]:
    return walks[key].files if key in walks else []


def _set_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of the sets; a folder of classes without sets is that of the training set."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise DataError(f"path={root} does not exist{kind_of_missing(root)}") from error
    except NotADirectoryError as error:
        raise DataError(f"path={root} must be a folder with a folder for each class") from error
    except OSError as error:
        raise DataError(f"path={root} cannot be read: {error.strerror or error}") from error
    names = [entry.name for entry in entries if not is_hidden(entry.name) and os.path.isdir(entry.path)]
    found: dict[str, Path] = {}
    for name in names:
        part = next((part for part, known in _SET_NAMES.items() if name.lower() in known), None)
        if part is None:
            continue
        if part in found:
            raise DataError(f"{_shown(root)} has both {found[part].name} and {_shown(name)}: merge them")
        found[part] = root / name
    others = [name for name in names if root / name not in found.values()]
    # A class may be called `train` or `test`: sets are all folders, or at least two of them.
    if not found or (others and len(found) == 1):
        return {"train": root}
    for part, folder in list(found.items()):
        if not _subfolders(folder):
            if part == "train":
                raise DataError(f"{_shown(folder)} has no folders: expected a folder for each class")
            # The images of a competition's test have no labels.
            warnings.warn(f"left out {_shown(folder)}, which has no folder for each class", stacklevel=3)
            del found[part]
    if others:
        warnings.warn(f"{_shown(root)}: left out folders beside {', '.join(_SET_NAMES)}: {few(others)}", stacklevel=3)
    return found


def _subfolders(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{_shown(folder)} cannot be read: {error.strerror or error}") from error
    return [name for name in names if not is_hidden(name) and os.path.isdir(folder / name)]


def _walk_classes(root: Path, folder: Path) -> dict[str, Walk]:
    """Returns what lies below each folder of ``folder``, by the name of its class."""
    place = folder.relative_to(root).as_posix()
    prefix = "" if place == "." else f"{place}/"
    return {_printable_name(name): walk_images(folder / name, f"{prefix}{name}/") for name in _subfolders(folder)}


def _warn_of_leftovers(folder: Path, walks: dict[str, Walk]) -> None:
    direct = [
        entry.name + ("/" if entry.is_dir() else "")
        for entry in os.scandir(folder)
        if _printable_name(entry.name) not in walks
    ]
    others = sorted(direct) + [name for walk in walks.values() for name in walk.others]
    warn_of_others(folder, others, [path for walk in walks.values() for path in walk.unreadable])


def _check_classes(folder: Path, classes: tuple[str, ...], walks: dict[str, Walk]) -> None:
    """Rejects a folder that has no two classes, and warns of classes that somebody may have meant otherwise."""
    empty = [name for name, walk in walks.items() if not walk.files]
    if not walks:
        files = len(walk_images(folder).files)
        holds = "holds no folders" if not files else f"holds {files} images and no folders"
        raise DataError(f"{_shown(folder)} {holds}: expected a folder for each class")
    if not classes:
        raise DataError(f"{_shown(folder)} holds no images ({FORMATS}) in its folders {few(empty)}")
    if len(classes) == 1:
        inner = _subfolders(folder / classes[0])
        place = advise(f"path={folder / classes[0]}")
        deeper = f"; its folders may be the classes: {place}" if len(inner) > 1 else ""
        raise DataError(
            f"{_shown(folder)} has images of one class alone, {_shown(classes[0])}: two or more are needed{deeper}"
        )
    if empty:
        warnings.warn(f"{_shown(folder)}: left out folders without images: {few(empty)}", stacklevel=3)
    folded: dict[str, str] = {}
    for name in classes:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            warnings.warn(
                f"{_shown(folder)}: {_shown(other)} and {_shown(name)} differ in case alone and are two classes",
                stacklevel=3,
            )


def _split(files: list[LabelledFile], shares: dict[str, float]) -> dict[str, list[LabelledFile]]:
    """Splits sets off the training set.

    Args:
        files: the files of the training set.
        shares: the share of each other set. Of a class with three files or more, each set gets one at least.

    Returns:
        The files of the training set and of the other sets, sorted as ``files`` are.
    """
    parts: dict[str, list[LabelledFile]] = {name: [] for name in ("train", *shares)}
    by_class: dict[int, list[LabelledFile]] = defaultdict(list)
    for file in files:
        by_class[file.label].append(file)
    for members in by_class.values():
        left = sorted(members, key=_hash_of)
        for name, share in shares.items():
            least = 1 if share > 0 and len(members) > len(shares) else 0
            count = min(max(round(share * len(members)), least), len(left) - 1)
            parts[name] += left[:count]
            left = left[count:]
        parts["train"] += left
    return {name: sorted(part, key=lambda file: (file.label, file.file.name)) for name, part in parts.items()}


def _hash_of(file: LabelledFile) -> bytes:
    return hashlib.sha256(os.fsencode(file.file.name)).digest()


def _printable_name(name: str) -> str:
    """Returns the name of a class for records, which are in UTF-8; names of files may be in another encoding."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return printable(name)
    return name


def _shown(path: Path | str) -> str:
    return printable(str(path))
