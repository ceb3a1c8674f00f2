"""A data module of a text as bytes: the text is a file, a folder of files, or Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit.data.advice import advise
from lightkit.data.batches import TensorBatches, after_setup, check_positive, shard_kwargs
from lightkit.data.bigram import bits_per_byte
from lightkit.data.folds import Fold, Foldable
from lightkit.data.text_bytes import SEPARATOR, join_files, join_in_memory, map_file, read_whole, size_of
from lightkit.data.text_files import File, library_files, text_files
from lightkit.errors import DataError

_PARTS = ("train", "validation", "test")


class Text(Foldable, pl.LightningDataModule):
    """A data module of windows of a text: batches of inputs and targets, int64 ``(N, T)`` each.

    The target of a byte is the next byte of the text. The vocabulary is the 256 bytes, whatever they encode. The text
    may be larger than the memory, because it is read from the disk on demand. The files of a folder are joined once in
    the cache directory, with a zero byte between two files.

    A folder is split by file: a hash of the file's path within the folder decides to which part the file belongs. The
    split is the same on every machine, and a new file does not move another file to another part. Hidden files,
    ``__pycache__``, links to folders and what systems leave behind (Thumbs.db, ``__MACOSX``) are left out; a file with
    several names is read under the first name. A single file is split by position: training, then validation, then
    test.

    `with_fold` deals the files of a folder outside the test to the folds, which get about the same number of bytes. Of
    a single file each fold is a block; the memory then holds the blocks of the training.

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
        check_positive(context=context, batch_size=batch_size, eval_batch_size=eval_batch_size)
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
            optional = name == "validation" and self.validation_share == 0 and self.fold is None
            if len(part) <= self.context and not optional:
                sizes = ", ".join(f"{n} {len(p):,}" for n, p in zip(_PARTS, parts, strict=True))
                raise DataError(
                    f"the {name} part of {self._root()} has {len(part):,} bytes, but one window takes context + 1 = "
                    f"{self.context + 1}; all parts, in bytes: {sizes}; {self._remedy(name)}"
                )
        self.train, self.validation, self.test = (self._windows(part) for part in parts)

    def _remedy(self, part: str) -> str:
        """Returns what fills a part of the text that is shorter than a window."""
        context = f"a smaller {advise('context')} ({self.context})"
        if self.fold is not None and part != "test":
            return f"fewer folds than {self.fold.count} or {context} helps"
        if part == "train":
            names = advise("validation_share"), advise("test_share")
            keys = f"smaller {names[0]} ({self.validation_share}) and {names[1]} ({self.test_share})"
        else:
            share = self.validation_share if part == "validation" else self.test_share
            keys = f"a larger {advise(f'{part}_share')} ({share})"
        remedy = f"{keys} or {context} helps"
        if self._root().is_dir():
            # A few files, however long, may all fall into one part.
            remedy = f"of a folder each file goes to one part as a whole; {remedy}, as does a single file for all texts"
        if part == "validation":
            return f"{remedy}; {advise('validation_share=0')} trains without validation"
        return remedy

    def _root(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"]) if self.path is None else Path(self.path)

    def _parts(self) -> list[Tensor]:
        """Returns the bytes of training, validation and test, a uint8 tensor each."""
        root = self._root()
        if root.is_dir():
            found = library_files(root) if self.path is None else text_files(root)
            parts = [[file for file in found if self._part_of(file.name) == part] for part in _PARTS]
            if self.fold is not None:
                parts = _dealt(self.fold, [*parts[0], *parts[1]], parts[2])
            return join_files(parts) if self.is_own else join_in_memory(parts, root)
        return self._split(map_file(root, size_of(root)) if self.is_own else read_whole(root))

    def _split(self, whole: Tensor) -> list[Tensor]:
        """Returns training, validation and test of a text, which follow each other."""
        test = round(len(whole) * self.test_share)
        if self.fold is not None:
            begin, end = self.fold.block(len(whole) - test)
            before, held_out, after, last = whole.split([begin, end - begin, len(whole) - test - end, test])
            # As between two files, a byte that no text has keeps apart what did not follow each other.
            between = [torch.frombuffer(bytearray(SEPARATOR), dtype=torch.uint8)] if len(before) and len(after) else []
            return [torch.cat([before, *between, after]), held_out, last]
        validation = round(len(whole) * self.validation_share)
        return list(whole.split([len(whole) - validation - test, validation, test]))

    def _part_of(self, name: str) -> str:
        place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
        if place < self.test_share:
            return "test"
        return "validation" if place < self.test_share + self.validation_share else "train"

    def _begin_fold(self, fold: Fold) -> None:
        self.train = self.validation = self.test = None

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


def _dealt(fold: Fold, files: list[File], test: list[File]) -> list[list[File]]:
    """Returns the files of training, validation and test for a fold.

    Args:
        fold: the fold.
        files: the files outside the test.
        test: the files of the test.
    """
    files = sorted(files, key=lambda file: file.name)
    is_held_out = dict(zip(files, fold.deal([file.size for file in files]), strict=True))
    train = [file for file in files if not is_held_out[file]]
    return [train, [file for file in files if is_held_out[file]], test]
