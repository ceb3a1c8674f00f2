"""Splits the rows of a table into training, validation and test."""

from __future__ import annotations

import numpy as np
import torch

from lightkit.data.advice import advise
from lightkit.data.folds import Fold
from lightkit.data.images import stratified_split
from lightkit.data.tables import Table
from lightkit.errors import DataError

# A class of fewer rows stays in the training as a whole.
_MIN_ROWS = 3


def check_sizes(sizes: dict[str, float]) -> None:
    """Rejects a size that is neither a share from 0 to below 1 nor a number of rows.

    Args:
        sizes: the sizes by the names of their arguments.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not value >= 0 or (value >= 1 and value != int(value)):
            raise DataError(f"{name} must be a share from 0 to below 1 or a whole number of rows, got {value}")


def split_rows(
    labels: np.ndarray | None,
    rows: int,
    sizes: dict[str, float],
    seed: int,
    order: np.ndarray | None,
    table: Table,
    fold: Fold | None = None,
) -> dict[str, np.ndarray]:
    """Returns the indices of the rows of each part, ascending int64 arrays: ``train``, and the parts of ``sizes``.

    Args:
        labels: the classes of the rows, int64 ``(R)``, whose mix is the same in each part; None for no classes.
        rows: the number of rows R.
        sizes: the sizes of the parts by name: a share of the rows, or a number of them.
        seed: the seed of the split.
        order: the indices of the rows in the order of time, of which the last part of ``sizes`` gets the last rows;
            None splits at random.
        table: the table, for messages.
        fold: the fold whose rows are the part ``validation``; None takes the size of ``sizes``. Folds divide the rows
            outside the test with the same mix of classes, or with ``order`` into blocks of time.

    Raises:
        DataError: fewer than two rows are left for the training, or a part gets none.
    """
    if fold is not None:
        return _split_fold(labels, rows, sizes, seed, order, table, fold)
    counts = {name: _count(size, rows) for name, size in sizes.items()}
    free = np.arange(rows) if order is None else order
    kept = np.empty(0, dtype=np.int64)
    if labels is not None and order is None:
        is_rare = np.bincount(labels)[labels] < _MIN_ROWS
        free, kept = np.flatnonzero(~is_rare), np.flatnonzero(is_rare)
    if rows - sum(counts.values()) < 2 or len(free) <= sum(counts.values()):
        wanted = ", ".join(f"{advise(f'{name}_size={sizes[name]}')}" for name in sizes)
        raise DataError(f"{table.path} has {rows} rows, too few for a training with {wanted}")
    parts: dict[str, np.ndarray] = {}
    for name in reversed(list(sizes)):
        if order is not None:
            cut = len(free) - counts[name]
            free, parts[name] = free[:cut], np.sort(free[cut:])
            continue
        classes = torch.zeros(len(free), dtype=torch.long) if labels is None else torch.from_numpy(labels[free])
        rest, held_out = (indices.numpy() for indices in stratified_split(classes, counts[name], seed))
        free, parts[name] = free[rest], free[held_out]
    return {"train": np.sort(np.concatenate([free, kept])), **{name: parts[name] for name in sizes}}


def _split_fold(
    labels: np.ndarray | None,
    rows: int,
    sizes: dict[str, float],
    seed: int,
    order: np.ndarray | None,
    table: Table,
    fold: Fold,
) -> dict[str, np.ndarray]:
    """Returns the rows of each part with a fold for validation: see `split_rows`."""
    # The test is that of the training without folds.
    others = {name: size for name, size in sizes.items() if name != "validation"}
    parts = split_rows(labels, rows, others, seed, order, table)
    free = parts["train"]
    if order is not None:
        free = order[np.isin(order, free)]
        begin, end = fold.block(len(free))
        held_out, rest = free[begin:end], np.concatenate([free[:begin], free[end:]])
    else:
        classes = torch.zeros(len(free), dtype=torch.long) if labels is None else torch.from_numpy(labels[free])
        rest, held_out = (free[indices.numpy()] for indices in fold.split(classes, seed))
    return {**parts, "train": np.sort(rest), "validation": np.sort(held_out)}


def _count(size: float, rows: int) -> int:
    return int(size) if size >= 1 or size == 0 else max(2, round(rows * size))
