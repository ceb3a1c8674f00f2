"""Reads a column of a table as numbers, as parts of dates, or as categories, and finds which of them it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightkit._util.printable import printable
from lightkit.data.advice import advise
from lightkit.data.tables import Numbers, Table
from lightkit.data.tables.numbers import is_gap, looks_like_number
from lightkit.data.tables.table import CellDataError
from lightkit.data.tables.times import Times
from lightkit.errors import DataError
from lightkit.targets import nearest

ColumnKind = Literal["number", "date", "category", "empty"]

# The numbers that a date becomes, in the order of `RawColumn.values`.
DATE_PARTS = ("year", "month", "day", "weekday", "hour")

# The characters of a category; longer texts that begin alike are one category.
MAX_TEXT = 200

# The cells that tell whether a column has numbers with a few faulty ones, or texts.
_SAMPLE = 1000
_MOSTLY = 0.9

# A program that knows no whole numbers with gaps, such as pandas, writes 3.0 for 3.
_WHOLE = re.compile(r"([-+]?\d+)\.0+")

_MICROSECONDS_A_DAY, _MICROSECONDS_AN_HOUR = 86_400_000_000, 3_600_000_000


@dataclass(frozen=True)
class RawColumn:
    """The values of a column before they are encoded.

    Attributes:
        name: the name of the column.
        kind: what the column has.
        values: numbers as a float64 array ``(R, 1)``, parts of dates as ``(R, 5)`` in the order of `DATE_PARTS`, each
            NaN for a gap; or categories as an object array ``(R)`` of str, empty for a gap.
        notes: how the cells were read, where they are not plain.
    """

    name: str
    kind: ColumnKind
    values: np.ndarray
    notes: tuple[str, ...] = ()


def unique_names(table: Table) -> list[str]:
    """Returns the names of a table's columns, a different one for each: ``column3`` without a name, then ``a (2)``."""
    names: list[str] = []
    taken = set(table.names)
    for number, name in enumerate(table.names, start=1):
        found, count = name or f"column{number}", 1
        while found in names or (count > 1 and found in taken):
            count += 1
            found = f"{name} ({count})"
        names.append(found)
    return names


def find_column(names: Sequence[str], name: str, table: Table, setting: str) -> int:
    """Returns the index of the column ``name``.

    Args:
        names: the result of `unique_names`.
        name: the name.
        table: the table, for the message.
        setting: the argument that has the name, for the message.

    Raises:
        DataError: there is no such column.
    """
    if name not in names:
        advice = nearest(name, list(names))
        raise DataError(
            printable(f"{advise(f'{setting}={name}')}: {table.path} has no such column{advice}; it has {listed(names)}")
        )
    return names.index(name)


def read_column(table: Table, index: int, name: str, kind: ColumnKind | None = None) -> RawColumn:
    """Reads a column.

    Args:
        table: the table.
        index: the index of the column.
        name: the name of the column: see `unique_names`.
        kind: what the column has; None finds it.

    Raises:
        DataError: a cell is not of the kind; the message names the line.
    """
    if kind is None and table.kind(index) == "number" and (numbers := _all_numbers(table, index)) is not None:
        return RawColumn(name, "number", numbers.values.reshape(-1, 1), tuple(numbers.notes))
    cells = table.cells(index)
    gaps = np.fromiter((is_gap(cell) for cell in cells), bool, len(cells))
    if gaps.all() and kind is None:
        return RawColumn(name, "empty", np.empty(len(cells)))
    if kind is None:
        kind = _find_kind(table, index, cells, gaps)
    if kind == "category":
        values = np.full(len(cells), "", dtype=object)
        values[~gaps] = [category_of(cell) for cell in cells[~gaps]]
        return RawColumn(name, kind, values)
    if kind == "date":
        return _read_dates(table, index, name, gaps)
    try:
        numbers = table.numbers(index)
    except CellDataError as error:
        raise DataError(
            f"{error}; {advise(f'categories=[{name}]')} reads the column as categories, "
            f"{advise(f'ignore=[{name}]')} leaves it out"
        ) from error
    return RawColumn(name, kind, numbers.values.reshape(-1, 1), tuple(numbers.notes))


def category_of(cell: str) -> str:
    """Returns the category of a cell that is no gap: its text, a whole number without decimals."""
    whole = _WHOLE.fullmatch(cell)
    return whole[1] if whole else cell[:MAX_TEXT]


def _all_numbers(table: Table, index: int) -> Numbers | None:
    """Returns the numbers of a column whose cells are numbers or gaps, without codes; None for another column."""
    try:
        numbers = table.numbers(index)
    except CellDataError:
        return None
    return None if any(map(_is_code, table.cells(index))) else numbers


def _is_code(cell: str) -> bool:
    """Returns True for a code such as a postcode; a number has no zeros in front."""
    return cell[:1] == "0" and len(cell) > 1 and cell.isdecimal()


def _find_kind(table: Table, index: int, cells: np.ndarray, gaps: np.ndarray) -> ColumnKind:
    """Returns the kind of a column that has cells beside its gaps.

    A column of numbers in which some cells are none has numbers if nine of ten cells are, and else categories.
    """
    present = cells[~gaps]
    sample = present[:: max(1, len(present) // _SAMPLE)]
    found = table.kind(index)
    if found == "date":
        try:
            table.take(np.flatnonzero(~gaps)).times(index)
        except CellDataError:
            return "category"
        return "date"
    if np.mean([looks_like_number(cell) for cell in sample]) < _MOSTLY:
        return "category"
    return "category" if any(map(_is_code, present)) else "number"


def _read_dates(table: Table, index: int, name: str, gaps: np.ndarray) -> RawColumn:
    """Reads a column of times as the parts of dates: numbers that repeat each year, week or day, and the year."""
    values = np.full((len(gaps), len(DATE_PARTS)), np.nan)
    times = table.take(np.flatnonzero(~gaps)).times(index) if not gaps.all() else None
    if times is not None:
        values[~gaps] = np.stack(_date_parts(times), axis=1)
    return RawColumn(name, "date", values, () if times is None else tuple(times.notes))


def _date_parts(times: Times) -> list[np.ndarray]:
    """Returns the parts of times in the order of `DATE_PARTS`, float64 ``(R)`` each; the year has a fraction."""
    zero = np.zeros(len(times))
    if times.kind in ("month", "quarter"):
        months = times.values * (1 if times.kind == "month" else 3)
        return [months / 12, months % 12 + 1.0, zero, zero, zero]
    if times.kind == "number":
        return [np.asarray(times.values, dtype=np.float64), zero, zero, zero, zero]
    clock = times.values if times.wall_clock is None else times.wall_clock
    moments = clock.astype("datetime64[us]")
    years = moments.astype("datetime64[Y]")
    months = moments.astype("datetime64[M]")
    days = clock // _MICROSECONDS_A_DAY
    since = (moments - years.astype("datetime64[us]")).astype(np.float64) / (_MICROSECONDS_A_DAY * 365.25)
    return [
        years.astype(np.int64) + 1970 + since,
        months.astype(np.int64) % 12 + 1.0,
        (moments.astype("datetime64[D]") - months.astype("datetime64[D]")).astype(np.float64) + 1,
        # The first of January 1970 was a Thursday; Monday is 0.
        (days + 3) % 7 + 0.0,
        (clock % _MICROSECONDS_A_DAY) / _MICROSECONDS_AN_HOUR,
    ]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Returns names for a message: the first ones, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
