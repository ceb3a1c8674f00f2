"""A reader of one column of a CSV file and of the column of its times, which checks every cell of both."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit._util.regular_files import open_regular
from lightkit.errors import DataError

# Limits of a file. A cell is held as a string of some hundred bytes.
_MAX_BYTES, _MAX_CELLS = 512 << 20, 20_000_000

_MISSING = ("error", "interpolate")

# Returns a time that can be compared, and the time as the report shows it.
_Parser = Callable[[str], tuple[Any, str]]


@dataclass(frozen=True)
class Column:
    """A column of numbers in the order of time.

    Attributes:
        name: the name of the column.
        values: a float64 tensor ``(T)``, finite.
        measured: a bool tensor ``(T)``; False where the cell is empty and ``values`` has an interpolated number.
        times: the T times as text, dates in ISO 8601; None without a time column.
    """

    name: str
    values: Tensor
    measured: Tensor
    times: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)


def read_column(
    path: str | Path, column: str | None = None, time_column: str | None = None, missing: str = "error"
) -> Column:
    """Reads a column of a CSV file whose first line names the columns and whose rows are in time order.

    Args:
        path: a regular file, UTF-8, separated by commas.
        column: the name of the column; None takes the only column of numbers.
        time_column: the name of a column of dates (ISO 8601, or YYYYMMDD) or numbers, which must increase; None checks
            no times.
        missing: ``"error"`` rejects empty cells, ``"interpolate"`` interpolates linearly between the values before and
            after a gap.

    Raises:
        DataError: the file cannot be read, an argument does not fit the file, or a cell is invalid; for a cell the
            message names the line and the column.
    """
    if missing not in _MISSING:
        raise DataError(f"missing must be one of {', '.join(_MISSING)}, got {missing!r}")
    path = Path(path)
    header, rows, lines = _read_rows(path)
    times = None
    if time_column is not None:
        index = _index_of(time_column, header, path)
        times = _read_times([row[index] for row in rows], lines, f"{path}, column {time_column}")
    index = _only_numeric(header, rows, time_column, path) if column is None else _index_of(column, header, path)
    name = header[index]
    cells = [row[index] for row in rows]
    values = np.array([_number(cell, path, line, name) for cell, line in zip(cells, lines, strict=True)])
    gaps = np.isnan(values)
    if gaps.any():
        _fill(values, gaps, lines, missing, f"{path}, column {name}")
    return Column(name, torch.from_numpy(values), torch.from_numpy(~gaps), times)


def _read_rows(path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Returns the cells of the header, the cells of each row, and the number of the line in which each row ends."""
    rows, lines, cells = [], [], 0
    try:
        # utf-8-sig: spreadsheets begin a file with a byte-order mark, which is no part of the first name.
        with io.TextIOWrapper(open_regular(path, _MAX_BYTES), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                cells += len(row) + 1
                if cells > _MAX_CELLS:
                    raise DataError(f"{path} has more than {_MAX_CELLS:,} cells, the limit of a file")
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except DataError:
        raise
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    while rows and not any(rows[-1]):
        rows.pop()
        lines.pop()
    if not rows:
        raise DataError(f"{path} is empty")
    header, width = rows[0], len(rows[0])
    if all(_is_number(cell) for cell in header):
        raise DataError(f"{path} has no header: line {lines[0]} must name the columns, it has {', '.join(header)}")
    if len(rows) == 1:
        raise DataError(f"{path} has a header and no rows")
    for i in range(1, len(rows)):
        # An empty line of a file with one column is an empty cell.
        if not rows[i] and width == 1:
            rows[i] = [""]
        if len(rows[i]) != width:
            raise DataError(f"{path}, line {lines[i]}: {len(rows[i])} cells, but the header has {width}")
    return header, rows[1:], lines[1:]


def _is_number(cell: str) -> bool:
    # float() accepts 1_000; other programs do not.
    if "_" in cell:
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, path: Path, line: int, name: str) -> float:
    """Returns a cell as a finite number; NaN for an empty cell."""
    if not cell:
        return math.nan
    if not _is_number(cell):
        raise DataError(f"{path}, line {line}, column {name}: {cell!r} is not a number")
    value = float(cell)
    if not math.isfinite(value):
        raise DataError(f"{path}, line {line}, column {name}: {cell} is not finite; leave the cell of a gap empty")
    return value


def _index_of(name: str, header: Sequence[str], path: Path) -> int:
    if (count := header.count(name)) != 1:
        problem = "has no column" if count == 0 else f"has {count} columns of the name"
        raise DataError(f"{path} {problem} {name!r}; it has {', '.join(header)}")
    return header.index(name)


def _only_numeric(header: Sequence[str], rows: Sequence[Sequence[str]], time_column: str | None, path: Path) -> int:
    """Returns the index of the only numeric column: a column is numeric if its first cell that is not empty is."""
    found: list[int] = []
    for index, name in enumerate(header):
        first = next((row[index] for row in rows if row[index]), "")
        if name != time_column and _is_number(first):
            found.append(index)
    if len(found) != 1:
        which = f"has the numeric columns {', '.join(header[i] for i in found)}" if found else "has no numeric column"
        raise DataError(
            f"{path} {which}: choose one with column=NAME (in training data.column=NAME); the columns are "
            f"{', '.join(header)}"
        )
    return found[0]


def _fill(values: np.ndarray, gaps: np.ndarray, lines: Sequence[int], missing: str, where: str) -> None:
    """Interpolates the gaps of ``values`` linearly, in place; rejects them if ``missing`` is ``"error"``."""
    first = int(gaps.argmax())
    if missing == "error":
        raise DataError(
            f"{where}: line {lines[first]} is empty ({int(gaps.sum())} in all); missing=interpolate "
            "(in training data.missing=interpolate) fills gaps"
        )
    if gaps[0] or gaps[-1]:
        line = lines[0] if gaps[0] else lines[-1]
        raise DataError(f"{where}: line {line} is empty, and a gap at an end has nothing to be interpolated from")
    values[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), values[~gaps])


def _read_times(cells: Sequence[str], lines: Sequence[int], where: str) -> tuple[str, ...]:
    """Returns the times as the report shows them; rejects times that do not increase."""
    # All times are of one kind. YYYYMMDD is a number, too; a date comes first.
    parsers: tuple[_Parser, ...] = (_compact_date, _iso_date, _plain_number)
    parse = next((parse for parse in parsers if _parses(parse, cells[0])), None)
    if parse is None:
        raise DataError(f"{where}, line {lines[0]}: {cells[0]!r} is neither a date (YYYY-MM-DD, YYYYMMDD) nor a number")
    times: set[Any] = set()
    shown: list[str] = []
    previous: Any = None
    for cell, line in zip(cells, lines, strict=True):
        try:
            time, text = parse(cell)
            in_order = previous is None or time > previous
        except (ValueError, TypeError) as error:
            # TypeError: some times have a time zone, others do not.
            raise DataError(f"{where}, line {line}: {cell!r} is not a time like {cells[0]!r}") from error
        if not in_order:
            problem = "is there a second time" if time in times else "comes before the line above it"
            raise DataError(f"{where}, line {line}: {cell} {problem}; rows must be in the order of time")
        times.add(time)
        shown.append(text)
        previous = time
    return tuple(shown)


def _parses(parse: _Parser, cell: str) -> bool:
    try:
        parse(cell)
    except ValueError:
        return False
    return True


def _compact_date(cell: str) -> tuple[datetime, str]:
    if len(cell) != 8 or not cell.isdecimal():
        raise ValueError(cell)
    date = datetime(int(cell[:4]), int(cell[4:6]), int(cell[6:]))
    return date, date.date().isoformat()


def _iso_date(cell: str) -> tuple[datetime, str]:
    # Before Python 3.11 fromisoformat does not accept Z; since then it accepts dates without dashes, too.
    if "-" not in cell[1:]:
        raise ValueError(cell)
    return datetime.fromisoformat(cell.replace("Z", "+00:00")), cell


def _plain_number(cell: str) -> tuple[float, str]:
    if not _is_number(cell) or not math.isfinite(float(cell)):
        raise ValueError(cell)
    return float(cell), cell
