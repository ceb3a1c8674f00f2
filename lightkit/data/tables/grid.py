"""The cells of a file before their columns have names."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# A cell is held as a string of some hundred bytes, a column as an array.
MAX_CELLS, MAX_COLUMNS = 20_000_000, 100_000


@dataclass
class Grid:
    """Rows of equally many cells.

    Attributes:
        columns: the columns, each an object array ``(R)`` of str.
        lines: the line in which each row ends, an int64 array ``(R)``.
        unit: ``line`` for a text, ``row`` for a sheet.
        points_are_decimal: False if ``1.234`` may be a whole number in a file of this kind.
        notes: how the file was read, where it is not a plain CSV file.
    """

    columns: list[np.ndarray]
    lines: np.ndarray
    unit: str = "line"
    points_are_decimal: bool = True
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> list[str]:
        """Returns the cells of a row without the white space around them."""
        return [column[index].strip() for column in self.columns]
