"""Text as bytes: windows of a file, of a folder of files, or of Python's own standard library."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.regular_files import open_regular, warn_of_skipped
from lightkit.data.batches import TensorBatches, shard_kwargs
from lightkit.data.bigram import bits_per_byte
from lightkit.data.kept import is_kept, keep, kept_path, refuse
from lightkit.errors import DataError

_PARTS = ("train", "validation", "test")

# What stands between two files, and nowhere in a text.
SEPARATOR = b"\0"

# Bytes read from a file at once.
_CHUNK = 1 << 20

# Bytes of a text that are held in memory.
_MOST_IN_MEMORY = 1 << 30

# Folders of the standard library that are not of its code; the last is one file of documentation, a 16th of all.
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data")


class Text(pl.LightningDataModule):
    """Serves windows of a text as int64 ``(inputs (N, T), targets (N, T))``, the targets one byte further on.

    The vocabulary is the 256 bytes, whatever they encode. The text is read from the disk as it is needed (the files
    of a folder are joined once, with a zero byte between two, and kept in the cache directory), so that it may be
    larger than the memory.

    A folder is split by file, by a hash of each one's path within it: the same on every machine, and a file that is
    added moves no other. Hidden files and ``__pycache__`` are left out, and so are links to folders; a file that is
    there under several names is read under the first. A single file is split by position: its head, its middle and
    its tail.

    Args:
        path: a file or a folder. Default: the Python source files of the standard library of this Python.
        context: bytes of a window, T.
        batch_size: windows in a batch of training.
        eval_batch_size: of validation and test, where it changes nothing but speed.
        validation_share: share of the text, or of its files, for validation; 0 for none.
        test_share: the same for the test.
        seed: of the order of training. The split does not depend on it.

    Raises:
        DataError: an argument is out of its range, and in `setup`: there is no text at the path, a file cannot be
            read, or a part of the text is shorter than one window.
    """

    # What the samples are called in the plural.
    unit = "tokens"

    vocab_size = 256

    def __init__(
        self,
        path: str | None = None,
        context: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        validation_share: float = 0.05,
        test_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"context": context, "batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        if not (0 <= validation_share < 1 and 0 < test_share < 1 and validation_share + test_share < 1):
            raise DataError(
                "validation_share must be at least 0, test_share more, and both together below 1, "
                f"got {validation_share} and {test_share}"
            )
        self.path = path
        # False where somebody else says which text it is: it might be any. Nothing of it is then kept in the cache
        # directory, and nothing mapped, which ends the process where the file is cut off meanwhile.
        self.is_own = True
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_share = validation_share
        self.test_share = test_share
        self.seed = seed
        # Windows, uint8 (N, T + 1): views that share their last byte with the next one's first.
        self.train: Tensor | None = None
        self.validation: Tensor | None = None
        self.test: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Finds, splits and maps the text, once."""
        if self.train is not None:
            return
        parts = self._parts()
        for name, part in zip(_PARTS, parts, strict=True):
            optional = name == "validation" and self.validation_share == 0
            if len(part) <= self.context and not optional:
                sizes = ", ".join(f"{n} {len(p):,}" for n, p in zip(_PARTS, parts, strict=True))
                # Few files, of whatever length, may all come into one part.
                advice = "; of a folder each file goes to one part as a whole, and a single file is cut into all three"
                raise DataError(
                    f"the {name} part of {self._root()} has {len(part):,} bytes, but one window takes context + 1 = "
                    f"{self.context + 1}; all parts, in bytes: {sizes}{advice if self._root().is_dir() else ''}"
                )
        self.train, self.validation, self.test = (self._windows(part) for part in parts)

    def _root(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"]) if self.path is None else Path(self.path)

    def _parts(self) -> list[Tensor]:
        """The bytes of training, validation and test."""
        root = self._root()
        if root.is_dir():
            found = library_files(root) if self.path is None else text_files(root)
            parts = [[file for file in found if self._part_of(file.name) == part] for part in _PARTS]
            return _join(parts) if self.is_own else _join_in_memory(parts, root)
        whole = _map(root, _open_text(root)) if self.is_own else _read_whole(root)
        test = round(len(whole) * self.test_share)
        validation = round(len(whole) * self.validation_share)
        return list(whole.split([len(whole) - validation - test, validation, test]))

    def _part_of(self, name: str) -> str:
        place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
        if place < self.test_share:
            return "test"
        return "validation" if place < self.test_share + self.validation_share else "train"

    def _windows(self, part: Tensor) -> Tensor:
        if len(part) <= self.context:
            return part.new_empty(0, self.context + 1)
        return part.unfold(0, self.context + 1, self.context)

    def _batches(self, windows: Tensor, batch_size: int, shuffle: bool = False) -> TensorBatches:
        return TensorBatches(
            (windows,),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **shard_kwargs(self.trainer, training=shuffle),
        )

    def train_dataloader(self) -> TensorBatches:
        """Shuffled batches of the windows of training."""
        return self._batches(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches | list:
        """Batches of the windows of validation, in order."""
        return self._batches(self.validation, self.eval_batch_size) if len(self.validation) else []

    def test_dataloader(self) -> TensorBatches:
        """Batches of the windows of the test, in order."""
        return self._batches(self.test, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Takes inputs and targets from windows, on the device of the batch."""
        (windows,) = batch
        return windows[:, :-1].long(), windows[:, 1:].long()

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """The bytes that are predicted in a batch."""
        return batch[1].numel()

    def encode(self, text: str | bytes) -> Tensor:
        """The tokens of a text, int64."""
        data = text.encode() if isinstance(text, str) else text
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0).long()

    def decode(self, tokens: Tensor) -> bytes:
        """The bytes that tokens stand for."""
        return bytes(tokens.tolist())

    def baselines(self) -> dict[str, float]:
        """Bits a byte of the test's targets under counts of single bytes and of pairs in the training text."""
        return {f"{name}_bits_per_byte": bits for name, bits in bits_per_byte(self.train, self.test).items()}


@dataclass(frozen=True)
class File:
    """A file that is there to be read: its path below the root, with slashes, and its size in bytes."""

    path: Path
    name: str
    size: int


def text_files(root: Path, suffix: str = "", without: tuple[str, ...] = ()) -> list[File]:
    """The files below a folder that are not hidden, sorted by name, each once.

    Args:
        root: the folder.
        suffix: what names must end with.
        without: folders that are left out.

    Raises:
        DataError: there are none, or one cannot be looked at.
    """
    found: list[File] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    # Links to folders are not followed: they may lead round in a circle.
    paths = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in (*without, "__pycache__") and name[0] != "."]
        paths += [Path(folder, name) for name in names if name[0] != "." and name.endswith(suffix)]
    skipped = []
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        try:
            status = path.stat()
        except OSError as error:
            # A link that leads nowhere, or in a circle.
            if not path.is_symlink() or error.errno not in (errno.ENOENT, errno.ELOOP):
                refuse(error)
            skipped.append(path)
            continue
        # A pipe or a device would be read for ever.
        if not stat.S_ISREG(status.st_mode):
            skipped.append(path)
            continue
        if status.st_size == 0 or (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        found.append(File(path, name, status.st_size))
    warn_of_skipped(skipped)
    if not found:
        raise DataError(f"{root} holds no text: no file that is neither hidden nor empty")
    return found


def library_files(root: Path) -> list[File]:
    """The Python sources of the standard library, without its tests and what else is installed."""
    return text_files(root, ".py", _NOT_LIBRARY)


def _open_text(path: Path) -> int:
    """Returns the size of a file that can be read.

    Raises:
        DataError: it cannot, or it is no regular file.
    """
    if not path.exists():
        raise DataError(f"there is no text at {path}")
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _map(path: Path, size: int) -> Tensor:
    """The bytes of a file, uint8, read when they are looked at."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    with open_regular(path) as file:
        # For reading alone: what may be written, the system wants memory for.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # torch knows no tensors that cannot be written. Batches are copies, and nobody writes to the windows.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _join(parts: list[list[File]]) -> list[Tensor]:
    """The joined files of each part, from the cache or else put there."""
    # Of the files, which names what is kept, and of their joined text, which it must be.
    digest, whole = hashlib.sha256(), hashlib.sha256()
    for part in parts:
        for index, file in enumerate(part):
            digest.update(f"{file.name}\n{file.size}\n".encode("utf-8", "surrogateescape"))
            whole.update(SEPARATOR if index else b"")
            for chunk in _read(file):
                digest.update(chunk)
                whole.update(chunk)
        digest.update(b"end of part\n")
    sizes = _sizes(parts)
    cached = kept_path(f"text-{digest.hexdigest()[:16]}.bin")
    is_whole = is_kept(cached)
    if is_whole and _digest(cached) != whole.digest():
        refuse(cached, "it is damaged")
        is_whole = False
    if not is_whole:
        try:
            keep(cached, lambda stream: _write_joined(stream, parts))
        except DataError:
            raise
        except OSError as error:
            warnings.warn(f"the joined text is not kept, but held in memory: {error}", stacklevel=2)
            joined = bytearray().join(_joined(parts))
            return list(torch.frombuffer(joined, dtype=torch.uint8).split(sizes))
    return list(_map(cached, sum(sizes)).split(sizes))


def _join_in_memory(parts: list[list[File]], root: Path) -> list[Tensor]:
    """Joins the files of each part in memory, of folders that are not too large.

    Raises:
        DataError: the folder is too large.
    """
    sizes = _sizes(parts)
    _check_size(root, sum(sizes))
    return list(torch.frombuffer(bytearray().join(_joined(parts)), dtype=torch.uint8).split(sizes))


def _read_whole(path: Path) -> Tensor:
    """Reads a file into memory, if it is not too large.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    _check_size(path, _open_text(path))
    with open_regular(path) as file:
        content = bytearray(file.read())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _check_size(root: Path, size: int) -> None:
    if size > _MOST_IN_MEMORY:
        raise DataError(
            f"{root} has {size:,} bytes, and of a text that a checkpoint names {_MOST_IN_MEMORY:,} are read; "
            "data_dir=PATH says which one is to be read, whatever its size"
        )


def _sizes(parts: list[list[File]]) -> list[int]:
    """Returns the bytes of each part, with a separator between two files."""
    return [sum(file.size for file in part) + max(len(part) - 1, 0) for part in parts]


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def _write_joined(stream: BinaryIO, parts: list[list[File]]) -> None:
    for chunk in _joined(parts):
        stream.write(chunk)


def _joined(parts: list[list[File]]) -> Iterator[bytes]:
    for part in parts:
        for index, file in enumerate(part):
            if index:
                yield SEPARATOR
            yield from _read(file)


def _read(file: File) -> Iterator[bytes]:
    """The content of a file, as long as it was when it was found.

    Raises:
        DataError: it cannot be read, or has become shorter.
    """
    left = file.size
    try:
        with open_regular(file.path) as stream:
            while left and (chunk := stream.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
    if left:
        raise DataError(f"{file.path} has changed while it was read")
