"""Folds of cross-validation: the part of the data that is held out in each of several trainings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightkit.errors import DataError

_Data = TypeVar("_Data", bound="Foldable")


@dataclass(frozen=True)
class Fold:
    """One of ``count`` equal parts of the data for training and validation, which is held out for validation.

    The parts of all folds together are the data, and no two of them overlap. The test set lies in none of them.

    Args:
        index: the number of the fold, from 0 to ``count - 1``.
        count: the number of folds, at least 2.

    Raises:
        DataError: an argument is out of its range.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise DataError(f"the number of folds must be at least 2, got {self.count}")
        if not 0 <= self.index < self.count:
            raise DataError(f"the fold must be from 0 to {self.count - 1}, got {self.index}")

    def split(self, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Splits samples into those of the other folds and those of this fold, with the same mix of classes.

        Args:
            labels: the classes of the samples, non-negative integers ``(N)``; all zero for samples without classes.
            seed: the seed of the split; a seed gives the same folds on every machine.

        Returns:
            The indices of the samples of the other folds and of this fold, int64, each ascending. The numbers of
            samples of a class in two folds differ by one at most, and so do the numbers of all samples.

        Raises:
            DataError: there are fewer samples than folds.
        """
        total = len(labels)
        self._check_total(total, "samples")
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        # Sorted by class and shuffled within a class: the folds take turns.
        by_class = shuffled[labels[shuffled].argsort(stable=True)]
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[by_class[self.index :: self.count]] = True
        return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)

    def block(self, total: int) -> tuple[int, int]:
        """Returns the begin and the end of this fold in ``total`` values, of which each fold is a contiguous block."""
        self._check_total(total, "values")
        return total * self.index // self.count, total * (self.index + 1) // self.count

    def deal(self, sizes: Sequence[int]) -> list[bool]:
        """Deals items of different sizes to the folds, so that all folds have about the same size.

        Args:
            sizes: the size of each item.

        Returns:
            For each item True if it belongs to this fold.

        Raises:
            DataError: there are fewer items than folds.
        """
        self._check_total(len(sizes), "files")
        owners, filled = [0] * len(sizes), [0] * self.count
        # The largest item first, each to the smallest fold.
        for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
            owners[item] = min(range(self.count), key=lambda index: (filled[index], index))
            filled[owners[item]] += sizes[item]
        return [owner == self.index for owner in owners]

    def _check_total(self, total: int, unit: str) -> None:
        if total < self.count:
            raise DataError(f"{self.count} folds need at least {self.count} {unit} outside the test set, got {total}")


class Foldable:
    """A mixin of data modules that serve the folds of a cross-validation.

    Attributes:
        fold: the fold whose samples are held out for validation; None for the split of the data module's arguments.
    """

    fold: Fold | None = None

    def with_fold(self: _Data, index: int, count: int) -> _Data:
        """Returns a copy of the data module for one training of a cross-validation; this data module stays as it is.

        The copy holds the samples of the fold out for validation and trains on the samples of the other folds. Its test
        set is that of this data module.

        Args:
            index: the number of the fold, from 0 to ``count - 1``.
            count: the number of folds, at least 2.

        Raises:
            DataError: an argument is out of its range, or there are fewer samples than folds. A data module that reads
                its data later raises the second one in ``setup``.
        """
        fold = Fold(index, count)
        other = copy.copy(self)
        other.fold = fold
        # The trainer of the original must not decide on the shard and the device of the copy's batches.
        other.trainer = None  # pyright: ignore[reportAttributeAccessIssue]
        other._begin_fold(fold)
        return other

    def _begin_fold(self, fold: Fold) -> None:
        """Drops the parts that this copy has from its original, or splits them anew.

        Args:
            fold: the fold of this copy.
        """
        raise NotImplementedError
