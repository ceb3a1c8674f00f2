"""Rows with named values, as JSON has them, as a table: their values become the texts that a file would have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightkit.data.tables import Table, TableSettings
from lightkit.data.tables import grid as limits
from lightkit.data.tables.grid import Grid
from lightkit.errors import DataError


def records_to_table(records: Sequence[Any], name: str = "rows") -> Table:
    """Returns the table of rows with named values.

    A column that a row does not have, and None, are gaps. Numbers keep all their digits.

    Args:
        records: the rows, mappings from the name of a column to a str, int, float, bool or None.
        name: what messages call the table.

    Raises:
        DataError: there is no row, a row is no mapping, a value is of another type, or there are too many cells.
    """
    if len(records) == 0:
        raise DataError(f"{name} must have at least one row, got none")
    names: dict[str, None] = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"{name}, row {number} must map names of columns to values, got {_kind(record)}")
        names.update(dict.fromkeys(map(str, record)))
    if not names:
        raise DataError(f"{name} must have at least one column, got rows without values")
    if len(records) * len(names) > limits.MAX_CELLS or len(names) > limits.MAX_COLUMNS:
        raise DataError(
            f"{name} has {len(records):,} rows and {len(names):,} columns; the limits are {limits.MAX_CELLS:,} cells "
            f"and {limits.MAX_COLUMNS:,} columns"
        )
    columns = [np.full(len(records), "", dtype=object) for _ in names]
    for column, key in zip(columns, names, strict=True):
        column[:] = [_text(record.get(key), name, row, key) for row, record in enumerate(records, start=1)]
    grid = Grid(columns, np.arange(1, len(records) + 1), unit="row")
    return Table(Path(name), list(names), grid, 0, TableSettings(decimal="point"))


def _text(value: Any, name: str, row: int, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (str, int)):
        return str(value)
    raise DataError(
        f"{name}, row {row}, column {column} must be a text, a number, a truth value or null, got {_kind(value)}"
    )


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
