"""A table with named columns, which are parsed on demand, and the lines of its rows for messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from lightkit.data.advice import advise
from lightkit.data.tables.cell_kinds import Kind, kind_of
from lightkit.data.tables.grid import Grid
from lightkit.data.tables.numbers import AmbiguousMark, CellError, Numbers, find_decimal, is_gap, parse_numbers
from lightkit.data.tables.settings import TableSettings
from lightkit.data.tables.times import AmbiguousDay, Times, parse_times
from lightkit.errors import DataError

_Parsed = TypeVar("_Parsed")

# The cells of a column that are asked for its kind, or for the decimal mark of another column.
_SAMPLE = 1000

# Names of a column of years.
_YEAR_NAMES = ("year", "years", "yyyy", "jahr", "année", "annee", "anno", "año", "ano")

# The characters of a cell in a message.
_SHOWN = 80


class CellDataError(DataError):
    """An error in one cell.

    Args:
        message: the message.
        cell: the cell, a part of it if it is long.
    """

    def __init__(self, message: str, cell: str) -> None:
        super().__init__(message)
        self.cell = cell


class Table:
    """A table whose columns are arrays of text until they are parsed.

    Args:
        path: the file, for messages.
        names: the names of the columns; names may occur twice, and be empty.
        grid: the cells.
        start: the index of the first row of values in ``grid``.
        settings: the settings, of which ``decimal`` and ``day_first`` concern the parsing.
    """

    def __init__(self, path: Path, names: list[str], grid: Grid, start: int, settings: TableSettings) -> None:
        self.path = path
        self.names = tuple(names)
        self.notes = list(grid.notes)
        self._columns = [column[start:] for column in grid.columns]
        self._lines = grid.lines[start:]
        self._unit = grid.unit
        self._points_are_decimal = grid.points_are_decimal
        self._settings = settings

    def __len__(self) -> int:
        return len(self._lines)

    def index_of(self, name: str) -> int:
        """Returns the index of the column ``name``.

        Raises:
            DataError: no column or several columns have the name.
        """
        if (count := self.names.count(name)) != 1:
            problem = "has no column" if count == 0 else f"has {count} columns of the name"
            raise DataError(f"{self.path} {problem} {name!r}; it has {', '.join(self.names)}")
        return self.names.index(name)

    def take(self, rows: np.ndarray) -> Table:
        """Returns the table of some rows in the given order, whose messages name the lines of the file.

        Args:
            rows: the indices of the rows, an int64 array.
        """
        columns = [column[rows] for column in self._columns]
        notes = list(self.notes)
        grid = Grid(columns, self._lines[rows], self._unit, self._points_are_decimal, notes)
        return Table(self.path, list(self.names), grid, 0, self._settings)

    def assume(self, decimal: str | None, day_first: bool | None) -> Table:
        """Returns the table with settings for what it leaves open; its own settings stay.

        Args:
            decimal: the decimal mark, ``"."`` or ``","``; None for none.
            day_first: the order of day and month; None for none.
        """
        own = self._settings
        table = self.take(np.arange(len(self)))
        table._settings = replace(
            own,
            decimal=decimal if own.decimal is None else own.decimal,
            day_first=day_first if own.day_first is None else own.day_first,
        )
        return table

    def line(self, row: int) -> str:
        """Returns the place of a row in the file, such as ``line 5``."""
        return f"{self._unit} {self._lines[row]}"

    def cells(self, index: int) -> np.ndarray:
        """Returns the cells of a column without the white space around them, an object array ``(R)`` of str."""
        column = self._columns[index]
        cells = np.empty(len(column), dtype=object)
        cells[:] = [cell.strip() for cell in column]
        return cells

    def kind(self, index: int) -> Kind:
        """Returns the kind of the first cell of a column that is no gap; ``gap`` if there is none.

        Numbers of eight digits are days only if several of them are, and numbers of four digits are years, which are
        dates, in a column whose name says so.
        """
        present = (cell for cell in map(str.strip, self._columns[index]) if not is_gap(cell))
        first = next(present, "")
        if self.names[index].casefold() in _YEAR_NAMES and first.isdecimal() and len(first) == 4:
            return "date"
        kind = kind_of(first)
        if kind == "date" and first.isdecimal() and any(kind_of(cell) != "date" for cell in islice(present, _SAMPLE)):
            return "number"
        return kind

    def numbers(self, index: int) -> Numbers:
        """Parses a column of numbers; NaN where a cell is a gap.

        Raises:
            DataError: a cell is no finite number, or the decimal mark is not clear. The message names line and column.
        """

        def parse(cells: np.ndarray) -> Numbers:
            try:
                return parse_numbers(cells, self._settings.decimal, self._points_are_decimal)
            except AmbiguousMark:
                if (decimal := self._decimal_elsewhere(index)) is None:
                    raise
                return parse_numbers(cells, decimal, True)

        return self._parse(index, parse)

    def times(self, index: int) -> Times:
        """Parses a column of times.

        Raises:
            DataError: a cell is no time like the first, or the order of day and month is not clear. The message names
                line and column.
        """
        return self._parse(index, lambda cells: parse_times(cells, self._settings.day_first, self._settings.decimal))

    def _parse(self, index: int, parse: Callable[[np.ndarray], _Parsed]) -> _Parsed:
        cells, name = self.cells(index), self.names[index]
        try:
            return parse(cells)
        except CellError as error:
            cell = cells[error.index]
            shown = cell if len(cell) <= _SHOWN else f"{cell[:_SHOWN]}..."
            place = f"{self.path}, {self.line(error.index)}, column {name}"
            how = f" (the file was read as {', '.join(self.notes)})" if self.notes else ""
            raise CellDataError(f"{place}: {shown!r} {error.problem}{how}", shown) from error
        except AmbiguousMark as error:
            raise DataError(
                f"{self.path}, {self.line(error.index)}, column {name}: {cells[error.index]!r} has a decimal mark or "
                f"groups thousands, and no cell decides; {advise('decimal=comma')} or {advise('decimal=point')} does"
            ) from error
        except AmbiguousDay as error:
            raise DataError(
                f"{self.path}, {self.line(0)}, column {name}: {cells[0]!r} begins with the day or with the month, and "
                f"no cell decides; {advise('day_first=true')} or {advise('day_first=false')} does"
            ) from error

    def _decimal_elsewhere(self, index: int) -> str | None:
        """Returns the decimal mark that another column of numbers has; None if no column is decisive."""
        for other, column in enumerate(self._columns):
            if other != index and self.kind(other) == "number" and (found := find_decimal(column[:_SAMPLE].tolist())):
                return found
        return None
