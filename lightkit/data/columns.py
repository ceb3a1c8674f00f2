"""Reads one column of numbers of a table and the column of its times, in the order of time, and fills its gaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.data.advice import advise
from lightkit.data.tables import Table, TableSettings, Times, read_table
from lightkit.data.tables.table import CellDataError
from lightkit.data.time_steps import Steps, find_steps, in_order
from lightkit.errors import DataError

_MISSING = ("error", "interpolate", "drop")


@dataclass(frozen=True)
class Column:
    """A column of numbers in the order of time.

    Attributes:
        name: the name of the column.
        values: a float64 tensor ``(T)``, finite.
        measured: a bool tensor ``(T)``; False where the file has no value and ``values`` has an interpolated number.
        times: the T times as text, dates in ISO 8601; None without a time column.
        notes: how the file was read, where it is no plain CSV file.
    """

    name: str
    values: Tensor
    measured: Tensor
    times: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class _Rows:
    """The values of a column in the order of time, before its gaps are closed.

    Attributes:
        values: a float64 array ``(T)``, NaN for a gap.
        rows: the row of the table from which each value comes, an int64 array ``(T)``; -1 for an inserted time.
        times: the texts of the times; None without a time column.
        notes: see `Column`.
    """

    values: np.ndarray
    rows: np.ndarray
    times: tuple[str, ...] | None
    notes: list[str]


def read_column(
    path: str | Path,
    column: str | int | None = None,
    time_column: str | int | None = None,
    missing: str = "error",
    settings: TableSettings | None = None,
) -> Column:
    """Reads a column of a table whose rows are in the order of time, or in the reverse order.

    Args:
        path: a file that `lightkit.data.tables.read_table` reads.
        column: the name of the column; None takes the only column of numbers.
        time_column: the name of a column of dates or numbers, which must increase or decrease; None takes the only
            column of dates, if there is one and it does.
        missing: what becomes of gaps, which are cells without a value and, where the times have a regular step, times
            without a row. ``"error"`` rejects them. ``"interpolate"`` interpolates linearly between the values before
            and after a gap. ``"drop"`` leaves them out, and takes the rows that remain as evenly spaced.
        settings: how the table is written; None finds everything.

    Raises:
        DataError: the file cannot be read, an argument does not fit the file, or a cell is invalid; for a cell the
            message names the line and the column.
    """
    check_missing(missing)
    # No file is read for a wrong argument.
    return column_of(read_table(path, settings), column, time_column, missing)


def column_of(
    table: Table, column: str | int | None = None, time_column: str | int | None = None, missing: str = "error"
) -> Column:
    """Returns a column of a table: see `read_column`, which reads the table from a file."""
    check_missing(missing)
    # The name of a year is a number on a command line.
    column, time_column = (None if name is None else str(name) for name in (column, time_column))
    time_index, times = _read_times(table, time_column, column)
    index = _only_numeric(table, time_index) if column is None else table.index_of(column)
    numbers = table.numbers(index)
    found = _Rows(numbers.values, np.arange(len(table)), None, [*table.notes, *numbers.notes])
    if time_index is not None and times is not None:
        _put_in_order(found, times, missing, f"{table.path}, column {table.names[time_index]}", table)

    def describe_gap(position: int) -> str:
        row = int(found.rows[position])
        cell = table.cells(index)[row]
        return f"{table.line(row)} is {f'a gap, {cell!r}' if cell else 'empty'}"

    name = table.names[index]
    if missing == "drop" and (count := int(np.isnan(found.values).sum())):
        found.notes.append(f"{count:,} {'row' if count == 1 else 'rows'} without a value left out")
    where = f"{table.path}, column {name}"
    values, measured, shown = close_gaps(found.values, found.times, missing, where, describe_gap)
    return Column(name, values, measured, shown, tuple(found.notes))


def describe(path: str | Path, series: Column) -> str:
    """Returns the line that says how ``series`` was read from the file at ``path``, safe to print."""
    return printable(f"{Path(path).name}: {', '.join(series.notes)}")


def check_missing(missing: str) -> None:
    """Rejects a value of ``missing`` that `read_column` does not know."""
    if missing not in _MISSING:
        raise DataError(f"missing must be one of {', '.join(_MISSING)}, got {missing!r}")


def close_gaps(
    values: np.ndarray,
    times: tuple[str, ...] | None,
    missing: str,
    where: str,
    describe_gap: Callable[[int], str],
) -> tuple[Tensor, Tensor, tuple[str, ...] | None]:
    """Closes the gaps of a series.

    Args:
        values: a float64 array ``(T)``, NaN for a gap.
        times: the T times; None for none.
        missing: see `read_column`.
        where: the file and the column, for messages.
        describe_gap: returns a clause on the gap at an index, such as ``line 3 is empty``.

    Returns:
        The values without NaN, a bool tensor that is False where they are interpolated, and the times.

    Raises:
        DataError: ``missing`` is ``"error"`` and there is a gap, or a gap at an end cannot be interpolated.
    """
    gaps = np.isnan(values)
    if gaps.all():
        raise DataError(f"{where}: no cell has a number")
    if missing == "drop":
        kept = np.flatnonzero(~gaps)
        shown = None if times is None else tuple(times[index] for index in kept)
        return torch.from_numpy(values[kept]), torch.ones(len(kept), dtype=torch.bool), shown
    if gaps.any() and missing == "error":
        raise DataError(f"{where}: {describe_gap(int(gaps.argmax()))} ({int(gaps.sum()):,} in all); {_ways_out()}")
    if gaps[0] or gaps[-1]:
        problem = (
            f"{describe_gap(0 if gaps[0] else -1)}, and a gap at an end has no value on one side to interpolate from"
        )
        raise DataError(f"{where}: {problem}; {advise('missing=drop')} leaves gaps out")
    filled = values.copy()
    filled[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), values[~gaps])
    return torch.from_numpy(filled), torch.from_numpy(~gaps), times


def _ways_out() -> str:
    return f"{advise('missing=interpolate')} fills gaps, {advise('missing=drop')} leaves them out"


def _only_numeric(table: Table, time_index: int | None) -> int:
    """Returns the index of the only column of numbers beside the time; columns without a name count rows."""
    indices = [index for index in range(len(table.names)) if index != time_index]
    numeric = [index for index in indices if table.kind(index) == "number"]
    named = [index for index in numeric if table.names[index]]
    found = named if len(named) == 1 else numeric
    if len(found) != 1:
        names = ", ".join(table.names[index] for index in found)
        which = f"has the numeric columns {names}" if found else "has no numeric column"
        raise DataError(
            f"{table.path} {which}: choose one with {advise('column=NAME')}; the columns are {', '.join(table.names)}"
        )
    return found[0]


def _read_times(table: Table, name: str | None, value_name: str | None) -> tuple[int | None, Times | None]:
    """Returns the times in the column ``name``; for None those in the only column of dates that are in order.

    Args:
        table: the table. The function adds a note on how the times were found.
        name: the name of the column, which the user sets.
        value_name: the name of the column of values, which has no times.
    """
    if name is not None:
        index = table.index_of(name)
        times = table.times(index)
        table.notes += times.notes
        if not in_order(times).all() and not _is_descending(times):
            raise _disordered(table, index, times)
        return index, times
    dates = [index for index, of in enumerate(table.names) if of != value_name and table.kind(index) == "date"]
    if len(dates) == 1:
        (index,) = dates
        try:
            times = table.times(index)
        except CellDataError as error:
            table.notes.append(f"rows in their order, since column {table.names[index]} has {error.cell!r}")
            return None, None
        if in_order(times).all() or _is_descending(times):
            table.notes += [f"times from column {table.names[index]}", *times.notes]
            return index, times
        table.notes.append(f"rows in their order, which is not that of column {table.names[index]}")
    elif dates:
        names = " and ".join(table.names[index] for index in dates)
        table.notes.append(f"rows in their order, since {names} have dates")
    return None, None


def _is_descending(times: Times) -> bool:
    return len(times) > 1 and times.values[0] > times.values[-1] and bool(in_order(times.reversed()).all())


def _disordered(table: Table, index: int, times: Times) -> DataError:
    """Returns the error of times that neither increase nor decrease."""
    row = int(np.flatnonzero(~in_order(times))[0]) + 1
    is_second = (times.values[:row] == times.values[row]).any()
    problem = "is there a second time" if is_second else "comes before the line above it"
    place = f"{table.path}, column {table.names[index]}, {table.line(row)}"
    return DataError(f"{place}: {table.cells(index)[row]} {problem}; rows must be in the order of time")


def _put_in_order(found: _Rows, times: Times, missing: str, where: str, table: Table) -> None:
    """Turns a table around whose last row comes first, and inserts the missing times.

    Args:
        found: the rows of the table, which the function changes.
        times: the times of the rows.
        missing: see `read_column`; ``"drop"`` leaves the rows as they stand.
        where: the file and the column of times, for messages.
        table: the table, for messages.
    """
    if _is_descending(times):
        found.notes.append("rows from the last to the first")
        times, found.values, found.rows = times.reversed(), found.values[::-1].copy(), found.rows[::-1]
    found.times = times.text
    if missing == "drop":
        return
    steps = find_steps(times)
    found.notes += [] if steps.note is None else [steps.note]
    count = len(steps.filled)
    if count == 0:
        return
    if missing == "error":
        before = found.rows[int((np.diff(steps.positions) > 1).argmax())]
        raise DataError(
            f"{where}: {steps.filled_texts(1)[0]} is missing next to {table.line(before)} ({count:,} in all; "
            f"the times are {steps.step} apart); {_ways_out()}"
        )
    _spread(found, times, steps)
    found.notes.append(f"{count:,} missing {'time' if count == 1 else 'times'} interpolated")


def _spread(found: _Rows, times: Times, steps: Steps) -> None:
    """Moves the rows to their positions, with gaps between them."""
    count = int(steps.positions[-1]) + 1
    values, rows = np.full(count, np.nan), np.full(count, -1)
    texts = np.empty(count, dtype=object)
    inserted = np.ones(count, dtype=bool)
    inserted[steps.positions] = False
    values[steps.positions], rows[steps.positions] = found.values, found.rows
    texts[steps.positions], texts[inserted] = times.text, steps.filled_texts()
    found.values, found.rows, found.times = values, rows, tuple(texts)
