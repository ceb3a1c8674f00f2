"""A DataFrame of pandas as a table: its cells become the texts that a file would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightkit._util.imported import is_instance
from lightkit.data.tables import Table, TableSettings
from lightkit.data.tables import grid as limits
from lightkit.data.tables.grid import Grid
from lightkit.errors import DataError


def is_frame(value: Any) -> bool:
    """Returns True for a DataFrame of pandas, without importing pandas."""
    return is_instance(value, "pandas", "DataFrame")


def frame_to_table(frame: Any, name: str = "x") -> Table:
    """Returns the table of a DataFrame, without its index.

    Numbers keep all their digits; missing values are gaps.

    Args:
        frame: a ``pandas.DataFrame``.
        name: what messages call the table.

    Raises:
        DataError: the frame has no row or too many cells.
    """
    rows, columns = frame.shape
    if rows == 0 or columns == 0:
        raise DataError(f"{name} has {rows} rows and {columns} columns")
    if rows * columns > limits.MAX_CELLS:
        raise DataError(f"{name} has more than {limits.MAX_CELLS:,} cells, the limit of a table")
    cells = [_cells(frame.iloc[:, index]) for index in range(columns)]
    grid = Grid(cells, np.arange(rows), unit="row")
    return Table(Path(name), [str(label) for label in frame.columns], grid, 0, TableSettings(decimal="point"))


def _cells(column: Any) -> np.ndarray:
    """Returns the cells of a column as an object array ``(R)`` of str, empty for missing values."""
    missing = column.isna().to_numpy()
    cells = np.full(len(column), "", dtype=object)
    values = column.to_numpy(dtype=object)
    # str() of a timestamp is ISO 8601, and that of a float has all of its digits.
    cells[~missing] = [_text(value) for value in values[~missing]]
    return cells


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)
