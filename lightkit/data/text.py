"""A data module of a text as bytes: the text is a file, a folder of files, or Python's standard library."""

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
from typing import BinaryIO, NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.regular_files import open_regular, warn_of_skipped
from lightkit.data.batches import TensorBatches, after_setup, shard_kwargs
from lightkit.data.bigram import bits_per_byte
from lightkit.data.cache import cache_path, is_trusted, store, warn_of_rebuild
from lightkit.errors import DataError

_PARTS = ("train", "validation", "test")

# The byte between two joined files. It occurs in no text.
SEPARATOR = b"\0"

# Bytes that are read from a file at once.
_CHUNK = 1 << 20

# The limit in bytes of a text that is held in memory.
_MAX_IN_MEMORY = 1 << 30

# Folders of the standard library without code of it. pydoc_data is one file of documentation, a 16th of all bytes.
_EXCLUDED_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data")


class Text(pl.LightningDataModule):
    """A data module of windows of a text: batches of inputs and targets, int64 ``(N, T)`` each.

    The target of a byte is the next byte of the text. The vocabulary is the 256 bytes, whatever they encode. The text
    may be larger than the memory, because it is read from the disk on demand. The files of a folder are joined once in
    the cache directory, with a zero byte between two files.

    A folder is split by file: a hash of the file's path within the folder decides to which part the file belongs. The
    split is the same on every machine, and a new file does not move another file to another part. Hidden files,
    ``__pycache__`` and links to folders are left out; a file with several names is read under the first name. A single
    file is split by position: training, then validation, then test.

    Args:
        path: a file or a folder; None for the Python source files of the standard library of this Python.
        context: the number of bytes of an input, T.
        batch_size: the number of windows in a batch of training.
        eval_batch_size: the number of windows in a batch of validation and test; it changes the speed only.
        validation_share: the share of the text, or of the files of a folder, for validation; 0 for no validation.
        test_share: the share of the text, or of the files of a folder, for the test.
        seed: the seed of the order of the training batches. The split does not depend on it.

    Raises:
        DataError: an argument is out of its range, or `setup` finds no text, a file that cannot be read, or a part
            that is shorter than one window.
    """

    # The plural of a sample, which `lightkit.callbacks.Throughput` logs.
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
        # False if an untrusted checkpoint chose the path, which may be any. Such a text is not kept in the cache
        # directory and not mapped: the process would die if the file were truncated meanwhile.
        self.is_own = True
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_share = validation_share
        self.test_share = test_share
        self.seed = seed
        # Windows, uint8 (N, T + 1): views whose last byte is the first byte of the next window.
        self.train: Tensor | None = None
        self.validation: Tensor | None = None
        self.test: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Finds the text, splits it, and maps it into memory; a second call does nothing."""
        if self.train is not None:
            return
        parts = self._parts()
        for name, part in zip(_PARTS, parts, strict=True):
            optional = name == "validation" and self.validation_share == 0
            if len(part) <= self.context and not optional:
                sizes = ", ".join(f"{n} {len(p):,}" for n, p in zip(_PARTS, parts, strict=True))
                # A few files, however long, may all fall into one part.
                advice = "; of a folder each file goes to one part as a whole; a single file is cut into three parts"
                raise DataError(
                    f"the {name} part of {self._root()} has {len(part):,} bytes, but one window takes context + 1 = "
                    f"{self.context + 1}; all parts, in bytes: {sizes}{advice if self._root().is_dir() else ''}"
                )
        self.train, self.validation, self.test = (self._windows(part) for part in parts)

    def _root(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"]) if self.path is None else Path(self.path)

    def _parts(self) -> list[Tensor]:
        """Returns the bytes of training, validation and test, a uint8 tensor each."""
        root = self._root()
        if root.is_dir():
            found = library_files(root) if self.path is None else text_files(root)
            parts = [[file for file in found if self._part_of(file.name) == part] for part in _PARTS]
            return _join(parts) if self.is_own else _join_in_memory(parts, root)
        whole = _map(root, _size_of(root)) if self.is_own else _read_whole(root)
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
        """Returns shuffled batches of the training windows."""
        return self._batches(after_setup(self.train), self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches | list[Tensor]:
        """Returns batches of the validation windows in order; an empty list if there is no validation."""
        validation = after_setup(self.validation)
        return self._batches(validation, self.eval_batch_size) if len(validation) else []

    def test_dataloader(self) -> TensorBatches:
        """Returns batches of the test windows in order."""
        return self._batches(after_setup(self.test), self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs and the targets, int64 ``(N, T)`` each, of the windows ``(N, T + 1)`` of a batch."""
        (windows,) = batch
        return windows[:, :-1].long(), windows[:, 1:].long()

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """Returns the number of targets of a batch."""
        return batch[1].numel()

    def encode(self, text: str | bytes) -> Tensor:
        """Returns the bytes of a text as tokens, int64 ``(T)``; a string is first encoded as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0).long()

    def decode(self, tokens: Tensor) -> bytes:
        """Returns the text of ``tokens``, integers ``(T)`` from 0 to 255, as bytes."""
        return bytes(tokens.tolist())

    def baselines(self) -> dict[str, float]:
        """Returns the bits per byte of the test part under unigram and bigram counts of the training part.

        The keys are ``unigram_bits_per_byte`` and ``bigram_bits_per_byte``: see `lightkit.data.bigram.bits_per_byte`.
        """
        bits = bits_per_byte(after_setup(self.train), after_setup(self.test))
        return {f"{name}_bits_per_byte": value for name, value in bits.items()}


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
    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in (*without, "__pycache__") and name[0] != "."]
        paths += [Path(folder, name) for name in names if name[0] != "." and name.endswith(suffix)]
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
    if not found:
        raise DataError(f"{root} holds no text: no file that is neither hidden nor empty")
    return found


def library_files(root: Path) -> list[File]:
    """Returns the Python sources of the standard library in ``root``, without its tests and installed packages."""
    return text_files(root, ".py", _EXCLUDED_FOLDERS)


def _size_of(path: Path) -> int:
    """Returns the size of a file in bytes.

    Raises:
        DataError: the file cannot be read or is no regular file.
    """
    if not path.exists():
        raise DataError(f"there is no text at {path}")
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _map(path: Path, size: int) -> Tensor:
    """Returns the bytes of a file as a memory-mapped tensor, uint8 ``(size)``."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    with open_regular(path) as file:
        # The system reserves no memory for a mapping that is only read.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns. Batches are copies, and no code writes into the windows.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _join(parts: list[list[File]]) -> list[Tensor]:
    """Returns the joined bytes of the files of each part, memory-mapped from a file of the cache directory.

    The function writes that file first if it is missing, damaged or not trusted. If the file cannot be written, the
    bytes are in memory.
    """
    # One digest names the cached file, the other is that of its content.
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
    cached = cache_path(f"text-{digest.hexdigest()[:16]}.bin")
    is_whole = is_trusted(cached)
    if is_whole and _digest(cached) != whole.digest():
        warn_of_rebuild(cached, "it is damaged")
        is_whole = False
    if not is_whole:
        try:
            store(cached, lambda stream: _write_joined(stream, parts))
        except DataError:
            raise
        except OSError as error:
            warnings.warn(f"the joined text is held in memory, because it cannot be kept: {error}", stacklevel=2)
            joined = bytearray().join(_joined(parts))
            return list(torch.frombuffer(joined, dtype=torch.uint8).split(sizes))
    return list(_map(cached, sum(sizes)).split(sizes))


def _join_in_memory(parts: list[list[File]], root: Path) -> list[Tensor]:
    """Returns the joined bytes of the files of each part, in memory.

    Raises:
        DataError: the files of the folder ``root`` are too large together.
    """
    sizes = _sizes(parts)
    _check_size(root, sum(sizes))
    return list(torch.frombuffer(bytearray().join(_joined(parts)), dtype=torch.uint8).split(sizes))


def _read_whole(path: Path) -> Tensor:
    """Reads a file into memory, as a uint8 tensor.

    Raises:
        DataError: the file cannot be read or is too large.
    """
    _check_size(path, _size_of(path))
    with open_regular(path) as file:
        content = bytearray(file.read())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _check_size(root: Path, size: int) -> None:
    if size > _MAX_IN_MEMORY:
        raise DataError(
            f"{root} has {size:,} bytes; a text that a checkpoint names may have {_MAX_IN_MEMORY:,}. "
            "data_dir=PATH names a text of any size"
        )


def _sizes(parts: list[list[File]]) -> list[int]:
    """Returns the size in bytes of each part after its files are joined."""
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
    """Yields the content of a file up to the size that it had when it was found.

    Raises:
        DataError: the file cannot be read or has become shorter.
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
