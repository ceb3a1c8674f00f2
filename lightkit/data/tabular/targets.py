"""The column that a model predicts: classes or numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightkit._util.printable import few, printable
from lightkit.data.advice import advise
from lightkit.data.tables import Table
from lightkit.data.tables.table import CellDataError
from lightkit.data.tabular.columns import RawColumn, read_column
from lightkit.errors import DataError

KINDS = ("classification", "regression")

# Metrics of classes take at most so many.
MAX_CLASSES = 1000

# Whole numbers are classes if they are few, and each of them occurs in several rows.
_MAX_WHOLE, _MIN_ROWS_EACH = 20, 5


def read_target(table: Table, index: int, name: str, kind: str | None) -> RawColumn:
    """Reads the column of the target: categories for a classification, numbers for a regression.

    Args:
        table: the table.
        index: the index of the column.
        name: the name of the column.
        kind: ``"classification"`` or ``"regression"``. None takes texts and truth values, and whole numbers of which
            there are at most 20 different ones and five rows for each, as classes.

    Raises:
        DataError: the column is empty, has dates, or cannot be read as ``kind`` says.
    """
    if kind == "regression":
        try:
            return RawColumn(name, "number", *_numbers(table, index))
        except CellDataError as error:
            raise DataError(f"{error}; {advise('kind=classification')} takes the column for classes") from error
    raw = read_column(table, index, name, "category" if kind == "classification" else None)
    if raw.kind == "empty":
        raise DataError(f"{_where(table, name)} has no value to predict")
    if raw.kind == "date":
        raise DataError(f"{_where(table, name)} has dates; a target has classes or numbers")
    if raw.kind == "number" and _are_classes(raw.values[:, 0]):
        raw = read_column(table, index, name, "category")
    return raw


def find_classes(raw: RawColumn, table: Table) -> tuple[str, ...]:
    """Returns the classes of a column of categories in the order of their indices: numbers by size, texts by alphabet.

    Raises:
        DataError: there are fewer than two classes, or they are too many to be classes.
    """
    present = [cell for cell in raw.values.tolist() if cell]
    names = sorted(set(present))
    where = _where(table, raw.name)
    if len(names) < 2:
        raise DataError(f"{where} has only the value {printable(names[0]) if names else 'of a gap'!r}: two are needed")
    if len(names) > MAX_CLASSES or (len(names) > 20 and 2 * len(names) > len(present)):
        raise DataError(
            f"{where} has {len(names):,} different values in {len(present):,} rows, too many for classes "
            f"({few(names)}); {advise('kind=regression')} predicts numbers"
        )
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(names)


def encode_labels(raw: RawColumn, classes: Sequence[str], table: Table) -> np.ndarray:
    """Returns the class of each row as its index, int64 ``(R)``.

    Args:
        raw: the column, which has no gap.
        classes: the names of the classes.
        table: the table, for the message.

    Raises:
        DataError: a cell is none of the classes; the message names the line.
    """
    places = {name: index for index, name in enumerate(classes)}
    labels = np.fromiter((places.get(cell, -1) for cell in raw.values), np.int64, len(raw.values))
    if (labels < 0).any():
        row = int((labels < 0).argmax())
        raise DataError(
            f"{table.path}, {table.line(row)}, column {printable(raw.name)}: {printable(raw.values[row])!r} is none of "
            f"the classes of the training: {few(classes)}"
        )
    return labels


def _numbers(table: Table, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    numbers = table.numbers(index)
    return numbers.values.reshape(-1, 1), tuple(numbers.notes)


def _are_classes(values: np.ndarray) -> bool:
    present = values[~np.isnan(values)]
    different = len(np.unique(present))
    is_whole = bool((present == np.rint(present)).all())
    return is_whole and different <= max(2, min(_MAX_WHOLE, len(present) // _MIN_ROWS_EACH))


def _where(table: Table, name: str) -> str:
    return f"{table.path}, column {printable(name)}"
