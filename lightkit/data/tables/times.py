"""Parses a column of times: days, months, quarters and weeks in the usual layouts, or numbers that count anything."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone

import numpy as np

from lightkit._util.installation import how_to_install
from lightkit.data.tables.numbers import AmbiguousMark, CellError, parse_numbers
from lightkit.data.tables.time_layouts import Layout, Period, layout_of
from lightkit.errors import DataError

MICROSECONDS = {"D": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000, "us": 1}

# A column of one family has cells with and without seconds, fractions and so on: some layouts, not thousands.
_MOST_LAYOUTS = 20

# A number of more digits after the mark was rounded by a computer.
_MOST_DIGITS = 10

_OFFSET = re.compile(r"[+-]\d{2}(:?\d{2})?\Z")

_READ_AS = {"%d": "DD", "%m": "MM", "%Y": "YYYY", "%y": "YY"}


@dataclass(frozen=True)
class Times:
    """A parsed column of times.

    Attributes:
        kind: ``instant`` for points in time, ``month`` or ``quarter`` for periods, ``number`` for numbers.
        values: microseconds since 1970 as int64 ``(R)``; months or quarters since the year 0 as int64 ``(R)``; or
            float64 ``(R)``.
        text: the R times as text, dates in ISO 8601.
        unit: the smallest unit that a cell has, as NumPy names it; ``M`` and ``Q`` for periods.
        resolution: the value of the last written digit; 0 for times that are exact.
        has_zone: True if the instants are in UTC, False if they are the local time of a place.
        wall_clock: the local times as ``values``, where the cells have several differences from UTC; else None.
        notes: how the cells were read, where more than one way is in use.
    """

    kind: str
    values: np.ndarray
    text: tuple[str, ...]
    unit: str = ""
    resolution: float = 0
    has_zone: bool = False
    wall_clock: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def reversed(self) -> Times:
        """Returns the times in the reverse order."""
        clock = None if self.wall_clock is None else self.wall_clock[::-1].copy()
        return replace(self, values=self.values[::-1].copy(), text=self.text[::-1], wall_clock=clock)

    def format(self, values: np.ndarray) -> list[str]:
        """Returns times that are no cells of the column as text."""
        if self.kind == "number":
            digits = round(-math.log10(self.resolution)) if self.resolution else _MOST_DIGITS
            return [f"{value:.{digits}f}" if digits < _MOST_DIGITS else f"{value:.12g}" for value in values.tolist()]
        if self.kind == "quarter":
            return [f"{value // 4}Q{value % 4 + 1}" for value in values.tolist()]
        if self.kind == "month":
            return [f"{value // 12:04d}-{value % 12 + 1:02d}" for value in values.tolist()]
        unit = "m" if self.unit == "h" else self.unit
        shown = np.datetime_as_string(values.astype("datetime64[us]").astype(f"datetime64[{unit}]")).tolist()
        return [f"{time.replace('T', ' ')}{'Z' if self.has_zone and unit != 'D' else ''}" for time in shown]


class AmbiguousDay(ValueError):
    """An error in a column of dates whose first number may be the day or the month in each cell."""


def parse_times(cells: np.ndarray, day_first: bool | None, decimal: str | None) -> Times:
    """Parses the cells of a column, which are all of one kind.

    Args:
        cells: an object array ``(R)`` of str without white space around them.
        day_first: True if the day comes first in ``01/02/2020``; None finds out, if a number above 12 tells.
        decimal: the decimal mark of times that are numbers; None finds it.

    Raises:
        CellError: a cell is no time, or of another kind than the first.
        AmbiguousDay: ``day_first`` is None and no number is above 12.
        AmbiguousMark: the times are numbers, whose marks may be decimal marks or not.
    """
    layout = layout_of(cells[0])
    if layout is None:
        return _parse_number_times(cells, decimal)
    other = layout_of(cells[0], month_first=True)
    if other is None or other.family == layout.family:
        return _parse_dates(cells, layout, False)
    if day_first is not None:
        return _parse_dates(cells, layout if day_first else other, not day_first)
    found: list[Times] = []
    errors: list[CellError] = []
    for month_first in (False, True):
        try:
            found.append(_parse_dates(cells, other if month_first else layout, month_first))
        except CellError as error:
            errors.append(error)
    if len(found) == 2 and not np.array_equal(found[0].values, found[1].values):
        raise AmbiguousDay
    if not found:
        # The reading that fits more of the cells is the one that was meant.
        raise max(errors, key=lambda error: error.index)
    return found[0]


def _parse_number_times(cells: np.ndarray, decimal: str | None) -> Times:
    try:
        numbers = parse_numbers(cells, decimal, True)
    except CellError as error:
        if error.index == 0:
            problem = "is neither a date (YYYY-MM-DD, YYYYMMDD, DD.MM.YYYY, YYYY-MM, YYYYQ1 and others) nor a number"
        else:
            problem = f"is not a time like {cells[0]!r}"
        raise CellError(error.index, problem) from error
    if (gaps := np.isnan(numbers.values)).any():
        raise CellError(int(gaps.argmax()), f"is not a time like {cells[0]!r}")
    return Times(
        "number", numbers.values, tuple(cells), resolution=_last_digit(cells.tolist()), notes=tuple(numbers.notes)
    )


def _last_digit(cells: Sequence[str]) -> float:
    """Returns the value of the last digit that the longest fraction has; 0 if a cell has an exponent."""
    most = 0
    for cell in cells:
        if "e" in cell or "E" in cell:
            return 0
        mark = max(cell.rfind("."), cell.rfind(","))
        if mark >= 0:
            most = max(most, len(cell) - mark - 1)
    return 10.0**-most


def _parse_dates(cells: np.ndarray, layout: Layout, month_first: bool) -> Times:
    if layout.period in ("quarter", "week"):
        return _parse_periods(cells, layout.period)
    parsed, layouts = _parse_layouts(cells, layout, month_first)
    notes = () if layout.family.startswith("%Y") or "%b" in layout.family else (f"dates as {_readable(layout.family)}",)
    if layout.period == "month":
        months = parsed.astype("datetime64[M]").astype(np.int64) + 12 * 1970
        times = Times("month", months, (), "M", notes=notes)
    else:
        unit = min((found.unit for found in layouts), key=lambda unit: MICROSECONDS[unit])
        # Whole minutes are exact; a device that writes seconds may be late by one.
        resolution = MICROSECONDS[unit] if unit in ("s", "us") else 0
        values = parsed.astype(np.int64)
        clock = _wall_clock(cells, values) if layout.has_zone else None
        times = Times("instant", values, (), unit, resolution, layout.has_zone, clock, notes)
    iso = times.kind == "instant" and all(found.is_iso for found in layouts)
    return replace(times, text=tuple(cells) if iso else tuple(times.format(times.values)))


def _wall_clock(cells: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """Returns the local times of cells that end in a difference from UTC; None if they have one difference."""
    ends = [_OFFSET.search(cell) for cell in cells]
    offsets = {found[0] for found in ends if found}
    if len(offsets) < 2:
        return None
    minutes = {end: int(f"{end[0]}1") * (60 * int(end[1:3]) + int(end[3:].strip(":") or 0)) for end in offsets}
    shifts = np.array([minutes[found[0]] if found else 0 for found in ends])
    return values + shifts * MICROSECONDS["m"]


def _readable(form: str) -> str:
    for code, letters in _READ_AS.items():
        form = form.replace(code, letters)
    return form


def _parse_layouts(cells: np.ndarray, layout: Layout, month_first: bool) -> tuple[np.ndarray, list[Layout]]:
    """Returns the cells as datetime64[us], and the layouts that occur: cells may differ in their clocks."""
    try:
        import pandas
    except ImportError as error:
        raise DataError(f"reading times needs pandas: {how_to_install('app')}") from error
    values = np.full(len(cells), np.datetime64("NaT"), dtype="datetime64[us]")
    left = np.arange(len(cells))
    layouts: list[Layout] = []
    while len(left):
        found = layout_of(str(cells[left[0]]), month_first)
        if found is None or (found.family, found.has_zone) != (layout.family, layout.has_zone):
            raise CellError(int(left[0]), f"is not a time like {cells[0]!r}")
        part = cells[left]
        parsed = pandas.to_datetime(part, format=found.format, errors="coerce", utc=True)
        values[left] = parsed.tz_localize(None).as_unit("us").to_numpy()
        if parsed.unit == "ns":
            _parse_out_of_range(values, cells, left[np.isnat(values[left])], found.format)
        failed = np.isnat(values[left])
        if found.length is not None:
            # strptime takes five digits for a month of one digit.
            failed |= np.array([len(cell) != found.length for cell in part])
        layouts.append(found)
        if failed[0] or len(layouts) > _MOST_LAYOUTS:
            raise CellError(int(left[0]), f"is not a time like {cells[0]!r}" if left[0] else "is not a time")
        left = left[failed]
    return values, layouts


def _parse_out_of_range(values: np.ndarray, cells: np.ndarray, indices: np.ndarray, form: str) -> None:
    """Parses the cells that pandas 2 leaves out: its nanoseconds reach from 1677 to 2262 alone.

    Args:
        values: a datetime64[us] array, of which the function sets the elements that it can parse.
        cells: the cells.
        indices: the indices of the cells.
        form: the format of `datetime.strptime`.
    """
    for index in indices:
        with contextlib.suppress(ValueError):
            parsed = datetime.strptime(str(cells[index]), form)
            values[index] = parsed if parsed.tzinfo is None else parsed.astimezone(timezone.utc).replace(tzinfo=None)


def _parse_periods(cells: np.ndarray, period: Period) -> Times:
    """Parses quarters or weeks."""
    values = np.empty(len(cells), dtype=np.int64)
    for index, cell in enumerate(cells):
        found = layout_of(cell)
        digits = re.findall(r"\d+", cell)
        try:
            if found is None or found.period != period:
                raise ValueError(cell)
            if period == "quarter":
                year, quarter = sorted(digits, key=len, reverse=True)
                values[index] = 4 * int(year) + int(quarter) - 1
            else:
                values[index] = _week_start(cell)
        except ValueError as error:
            raise CellError(index, f"is not a time like {cells[0]!r}") from error
    if period == "week":
        return Times("instant", values, tuple(cells), "D")
    times = Times("quarter", values, (), "Q")
    return replace(times, text=tuple(times.format(values)))


def _week_start(cell: str) -> int:
    digits = re.sub(r"\D", "", cell)
    day = date.fromisocalendar(int(digits[:4]), int(digits[4:6]), int(digits[6:] or 1))
    return (day.toordinal() - date(1970, 1, 1).toordinal()) * MICROSECONDS["D"]


__all__ = ["MICROSECONDS", "AmbiguousDay", "AmbiguousMark", "Times", "parse_times"]
