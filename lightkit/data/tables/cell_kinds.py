"""Tells what a single cell looks like: a gap, a number, a time or text."""

from __future__ import annotations

import re
from typing import Literal

from lightkit.data.tables.numbers import is_gap, looks_like_number
from lightkit.data.tables.time_layouts import looks_like_date

# A fraction, or a whole number that is too short for a day.
_PLAIN = re.compile(r"-?(\d{1,7}|\d{1,15}\.\d{1,15})", re.ASCII)

Kind = Literal["gap", "number", "date", "text"]


def kind_of(cell: str) -> Kind:
    """Returns the kind of a cell without white space around it; eight digits that are a day are a date."""
    if _PLAIN.fullmatch(cell):
        # Wide tables have many such cells.
        return "number"
    if is_gap(cell):
        return "gap"
    if looks_like_date(cell):
        return "date"
    return "number" if looks_like_number(cell) else "text"
