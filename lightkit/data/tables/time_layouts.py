"""The layouts in which people write days, months, quarters and weeks, as formats of ``strptime``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Period = Literal["instant", "month", "quarter", "week"]

_CLOCK = (
    r"(?:(?P<gap>[T ]+)(?P<hour>\d{1,2})(?:(?P<minute>:)\d{2}(?:(?P<second>:)\d{2}(?:(?P<mark>[.,])\d{1,9})?)?)?"
    r"(?P<half>\ ?[AaPp][Mm])?(?P<zone>\ ?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}|[+-]\d{2}))?)?"
)
_MONTH_NAME = r"(?P<name>Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)(?P<rest>[a-z]*)"
_YEAR = r"(?P<year>\d{4}|\d{2})"
_BY = r"[-\ /.]{0,2}"
_YEARS = range(1500, 2500)


@dataclass(frozen=True)
class Layout:
    """A way to write a time.

    Attributes:
        family: cells of one column have one family; they may differ in the clock.
        period: the period that a cell names.
        format: the format of ``strptime``; empty for quarters and weeks.
        has_zone: True if the cell says how far its clock is from UTC.
        unit: the smallest unit that is written, as NumPy names it.
        is_iso: True if the cell is written as in ISO 8601.
        length: the number of characters that each cell must have; None for any.
    """

    family: str
    period: Period
    format: str
    has_zone: bool = False
    unit: str = "D"
    is_iso: bool = False
    length: int | None = None


def layout_of(cell: str, month_first: bool = False) -> Layout | None:
    """Returns the layout of a cell without white space around it; None if it is no time.

    Args:
        cell: the cell.
        month_first: take ``01/02/2020`` and ``01-02-2020`` for the second of January.
    """
    for pattern, build in _LAYOUTS:
        if (found := pattern.fullmatch(cell)) is not None:
            return build(found, month_first)
    return None


def looks_like_date(cell: str) -> bool:
    """Returns True if the cell is a day, month, quarter or week; six digits and a year alone are numbers."""
    if not cell or len(cell) > _LONGEST or cell.isdecimal():
        return len(cell) == _DAY_DIGITS and layout_of(cell) is not None
    return layout_of(cell) is not None


# No time has more characters; eight digits are a day.
_LONGEST, _DAY_DIGITS = 60, 8


def _instant(family: str, date: str, found: re.Match[str], is_iso: bool = False) -> Layout:
    """Returns the layout of a day with the clock that ``found`` has."""
    if found["gap"] is None:
        return Layout(family, "instant", date, is_iso=is_iso)
    half, zone, mark = found["half"], found["zone"], found["mark"]
    clock = found["gap"] + ("%I" if half else "%H")
    unit = "h"
    if found["minute"]:
        clock, unit = f"{clock}:%M", "m"
    if found["second"]:
        clock, unit = f"{clock}:%S", "s"
    if mark:
        clock, unit = f"{clock}{mark}%f", "us"
    if half:
        clock += half[:-2] + "%p"
    if zone:
        clock += zone if zone.strip().isalpha() else (" %z" if zone.startswith(" ") else "%z")
    return Layout(family, "instant", date + clock, bool(zone), unit, is_iso and not half)


def _year_first(found: re.Match[str], month_first: bool) -> Layout:
    mark = found["by"]
    return _instant(f"%Y{mark}%m{mark}%d", f"%Y{mark}%m{mark}%d", found, mark == "-" and len(found["date"]) == 10)


def _year_last(found: re.Match[str], month_first: bool) -> Layout:
    mark, year = found["by"], "%Y" if len(found["year"]) == 4 else "%y"
    # Where people write points the day comes first.
    month_first = month_first and mark != "."
    order = f"%m{mark}%d{mark}{year}" if month_first else f"%d{mark}%m{mark}{year}"
    return _instant(order, order, found)


def _named_day(found: re.Match[str], month_first: bool) -> Layout:
    year = "%Y" if len(found["year"]) == 4 else "%y"
    date = f"%d{found['by']}{_name_format(found)}{found['by2']}{year}"
    return _instant("%d %b %Y", date, found)


def _named_month_first(found: re.Match[str], month_first: bool) -> Layout:
    return _instant("%b %d %Y", f"{_name_format(found)}{found['by']}%d{found['by2']}%Y", found)


def _name_format(found: re.Match[str]) -> str:
    return "%B" if found["rest"] else "%b"


def _day_digits(found: re.Match[str], month_first: bool) -> Layout | None:
    if int(found["date"][:4]) not in _YEARS:
        return None
    layout = _instant("%Y%m%d", "%Y%m%d", found)
    return layout if found["gap"] else replace(layout, length=_DAY_DIGITS)


def _clock_digits(found: re.Match[str], month_first: bool) -> Layout | None:
    if int(found[0][:4]) not in _YEARS:
        return None
    gap = found["gap"] or ""
    seconds = len(found["clock"]) == 6
    form = f"%Y%m%d{gap}%H%M{'%S' if seconds else ''}"
    return Layout(form, "instant", form, unit="s" if seconds else "m", length=len(found[0]))


def _month(form: str) -> Callable[[re.Match[str], bool], Layout]:
    return lambda found, month_first: Layout(form, "month", form, unit="M")


def _month_digits(found: re.Match[str], month_first: bool) -> Layout | None:
    return Layout("%Y%m", "month", "%Y%m", unit="M", length=6) if int(found[0][:4]) in _YEARS else None


def _named_month(found: re.Match[str], month_first: bool) -> Layout:
    year = "%Y" if len(found["year"]) == 4 else "%y"
    return Layout("%b %Y", "month", f"{_name_format(found)}{found['by']}{year}", unit="M")


def _year_and_name(found: re.Match[str], month_first: bool) -> Layout:
    return Layout("%Y %b", "month", f"%Y{found['by']}{_name_format(found)}", unit="M")


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


_LAYOUTS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], bool], Layout | None]], ...] = (
    (_compiled(rf"(?P<date>\d{{4}}(?P<by>[-/.])\d{{1,2}}(?P=by)\d{{1,2}}){_CLOCK}"), _year_first),
    (_compiled(rf"\d{{1,2}}(?P<by>[-/.])\d{{1,2}}(?P=by){_YEAR}{_CLOCK}"), _year_last),
    (_compiled(rf"(?P<date>\d{{8}}){_CLOCK}"), _day_digits),
    (_compiled(r"\d{8}(?P<gap>[T ]?)(?P<clock>\d{6}|\d{4})"), _clock_digits),
    (
        _compiled(rf"\d{{1,2}}(?P<by>{_BY}){_MONTH_NAME}(?P<by2>{_BY},?\ ?){_YEAR}{_CLOCK}"),
        _named_day,
    ),
    (_compiled(rf"{_MONTH_NAME}(?P<by>[-\ .]{{1,2}})\d{{1,2}}(?P<by2>,?\ |-)\d{{4}}{_CLOCK}"), _named_month_first),
    (_compiled(r"\d{4}-\d{1,2}"), _month("%Y-%m")),
    (_compiled(r"\d{4}/\d{1,2}"), _month("%Y/%m")),
    (_compiled(r"\d{1,2}/\d{4}"), _month("%m/%Y")),
    (_compiled(r"\d{1,2}-\d{4}"), _month("%m-%Y")),
    (_compiled(r"\d{4}M\d{1,2}"), _month("%YM%m")),
    (_compiled(r"\d{4}-M\d{1,2}"), _month("%Y-M%m")),
    (_compiled(r"\d{4}(0[1-9]|1[0-2])"), _month_digits),
    (_compiled(rf"{_MONTH_NAME}(?P<by>{_BY}){_YEAR}"), _named_month),
    (_compiled(rf"(?P<year>\d{{4}})(?P<by>{_BY}){_MONTH_NAME}"), _year_and_name),
    (_compiled(r"\d{4}[-\ ]?[QqTK][1-4]|[Qq][1-4][-\ /]?\d{4}"), lambda *_: Layout("Q", "quarter", "", unit="Q")),
    (_compiled(r"\d{4}-?W\d{2}(-?[1-7])?"), lambda *_: Layout("W", "week", "")),
)
