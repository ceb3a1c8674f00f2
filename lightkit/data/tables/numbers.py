"""Parses a column of numbers as people write them: decimal commas, grouped thousands, percent and currency signs.

A column has one decimal mark, which the first cell that leaves no choice decides: ``3,5`` has a decimal comma, and so
has ``1.234,5``; ``1,234,567`` has none. ``1,234`` may be either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Cells that mean "no value" in files of Excel (in German #NV), pandas, R, SQL, Stata, Weka and statistical offices.
_GAPS = frozenset(
    "na n/a n.a. #n/a #na #nv <na> nan -nan null nil none \\n nat missing - -- --- – — − . .. ... … ? * : k.a.".split()
) | {"#n/a n/a", ""}
_LONGEST_GAP = 8

_EXCEL_ERRORS = frozenset(("#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#NULL!", "#WERT!", "#BEZUG!", "#ZAHL!"))

# A number of more characters is a mistake.
_LONGEST = 400

_UNIT = "[%‰$¢£¤¥֏฿₠-⃀＄￠￡￥￦﷼]"
_SIGN = "[-+−]"
_AFFIXES = re.compile(
    rf"(?P<open>\()?\s?(?P<sign>{_SIGN})?\s?(?P<unit>{_UNIT})?\s?(?P<inner>{_SIGN})?"
    rf"(?P<body>[\d.,][^()%]*?)\s?(?P<end>{_UNIT})?\s?(?P<trail>[-−])?\s?(?P<close>\))?"
)
# Thousands between spaces (also narrow ones that do not break) or apostrophes: no decimal mark looks like that.
_SPACED = re.compile(r"(\d{1,3}([ \u00a0\u2007\u2009\u202f'’])\d{3}(?:\2\d{3})*)((?:[.,]\d*)?(?:[eE][-+]?\d+)?)")

# Groups of three digits, or in India of two before the last three.
_BODIES = {
    mark: re.compile(
        rf"(?:(?:\d{{1,3}}(?:{group}\d{{3}})+|\d{{1,2}}(?:{group}\d{{2}})+{group}\d{{3}}|\d+)(?:{mark}\d*)?|{mark}\d+)"
        r"(?:[eE][-+]?\d+)?"
    )
    for mark, group in ((r"\.", ","), (",", r"\."))
}
_PATTERNS = {".": _BODIES[r"\."], ",": _BODIES[","]}
_SIMPLE = {mark: re.compile(rf"[-+]?\d+(?:{re.escape(mark)}\d*)?(?:[eE][-+]?\d+)?") for mark in ".,"}
_OTHER = {".": ",", ",": "."}
_MARK_NAMES = {".": "point", ",": "comma"}
_GROUP_NAMES = {",": "commas", ".": "points", "'": "apostrophes", "’": "apostrophes"}


@dataclass
class Numbers:
    """A parsed column.

    Attributes:
        values: a float64 array ``(R)``, exactly as ``float`` gives them; NaN where the cell is a gap.
        notes: how the cells were read, where they are not plain numbers.
    """

    values: np.ndarray
    notes: list[str] = field(default_factory=list)


class CellError(ValueError):
    """An error in a cell.

    Args:
        index: the index of the cell in its column.
        problem: a predicate whose subject is the cell, such as ``is not a number``.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(problem)
        self.index = index
        self.problem = problem


class AmbiguousMark(ValueError):
    """An error in a column whose marks may be decimal marks or separators of thousands.

    Args:
        index: the index of the first cell that has the mark.
    """

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def is_gap(cell: str) -> bool:
    """Returns True if a cell without white space around it is empty, or a word for "no value" such as ``N/A``."""
    return len(cell) <= _LONGEST_GAP and cell.casefold() in _GAPS


def looks_like_number(cell: str) -> bool:
    """Returns True if a cell without white space around it is a number with any decimal mark."""
    parts = _split(cell)
    return parts is not None and any(pattern.fullmatch(parts.body) for pattern in _PATTERNS.values())


def find_decimal(cells: Sequence[str]) -> str | None:
    """Returns the decimal mark that the first decisive cell has; None if none is decisive."""
    for cell in cells:
        if (found := _evidence(cell.strip())) is not None and found[1]:
            return found[0]
    return None


def parse_numbers(cells: np.ndarray, decimal: str | None, points_are_decimal: bool) -> Numbers:
    """Parses the cells of a column.

    Args:
        cells: an object array ``(R)`` of str without white space around them.
        decimal: the decimal mark; None finds it.
        points_are_decimal: True reads ``1.234`` as a decimal fraction even if no cell is decisive.

    Raises:
        CellError: a cell is no number, or is not finite.
        AmbiguousMark: ``decimal`` is None and no cell is decisive.
    """
    plain = _parse_plain(cells) if decimal != "," else None
    if plain is not None and (decimal == "." or points_are_decimal or not _is_ambiguous(cells)):
        return Numbers(plain)
    texts = cells.tolist()
    present = [index for index, cell in enumerate(texts) if not is_gap(cell)]
    first = None
    if decimal is None:
        decimal, first = _choose(texts, present, points_are_decimal)
    return _parse_written(texts, present, decimal, first)


def _parse_plain(cells: np.ndarray) -> np.ndarray | None:
    """Returns the values of cells that are empty or written as programs write numbers; None if a cell is neither."""
    try:
        values = np.where(cells == "", "nan", cells).astype(np.float64)
    except ValueError:
        return None
    # float() accepts 1_000; other programs do not.
    if np.isinf(values).any() or "_" in "".join(cells):
        return None
    return values


def _is_ambiguous(cells: np.ndarray) -> bool:
    found = None
    for cell in cells:
        if (evidence := _evidence(cell)) is not None:
            if evidence[1]:
                return False
            found = evidence
    return found is not None


@dataclass(frozen=True)
class _Parts:
    """A cell without signs and units; ``body`` has digits, marks and an exponent."""

    body: str
    negative: bool
    unit: str
    group: str
    notes: tuple[str, ...]


def _split(cell: str) -> _Parts | None:
    """Returns the parts of a cell; None if it cannot be a number."""
    found = _AFFIXES.fullmatch(cell) if len(cell) <= _LONGEST else None
    if found is None or bool(found["open"]) != bool(found["close"]) or (found["unit"] and found["end"]):
        return None
    signs = [sign for sign in (found["sign"], found["inner"], found["trail"]) if sign]
    notes = []
    if found["open"]:
        signs.append("-")
        notes.append("negative numbers in parentheses")
    if found["trail"]:
        notes.append("minus signs behind the numbers")
    if len(signs) > 1:
        return None
    body, group = found["body"], ""
    if spaced := _SPACED.fullmatch(body):
        group = spaced[2]
        body = spaced[1].replace(group, "") + spaced[3]
    return _Parts(body, signs[:1] in (["-"], ["−"]), found["unit"] or found["end"] or "", group, tuple(notes))


def _evidence(cell: str) -> tuple[str, bool] | None:
    """Returns what a cell says of the decimal mark.

    Returns:
        The decimal mark, and True if the cell leaves no choice; for ``1,234`` a comma and False. None for a cell
        without marks, or which is no number.
    """
    parts = _split(cell) if "." in cell or "," in cell else None
    if parts is None:
        return None
    body = parts.body
    fits = [mark for mark, pattern in _PATTERNS.items() if pattern.fullmatch(body)]
    marks = [mark for mark in ".," if mark in body]
    if not fits or not marks:
        return None
    if len(fits) == 1:
        return fits[0], True
    # Nobody groups 0,234 or 1,234e5; a number whose thousands have other marks has no other choice either.
    return marks[0], bool(parts.group) or body[0] == "0" or "e" in body.lower()


def _choose(cells: Sequence[str], present: Sequence[int], points_are_decimal: bool) -> tuple[str, int | None]:
    """Returns the decimal mark of a column, and the index of the cell that decides it."""
    unclear: dict[str, int] = {}
    for index in present:
        if (evidence := _evidence(cells[index])) is not None:
            if evidence[1]:
                return evidence[0], index
            unclear.setdefault(evidence[0], index)
    if not unclear or (points_are_decimal and "," not in unclear):
        return ".", None
    raise AmbiguousMark(min(unclear.values()))


def _parse_written(cells: Sequence[str], present: Sequence[int], decimal: str, first: int | None) -> Numbers:
    """Parses cells with a known decimal mark; ``first`` is the index of the cell that decided it."""
    values = np.full(len(cells), np.nan)
    is_simple, pattern, group = _SIMPLE[decimal].fullmatch, _PATTERNS[decimal], _OTHER[decimal]
    simple = [index for index in present if is_simple(cells[index])]
    values[simple] = np.array([cells[index].replace(decimal, ".") for index in simple], dtype=object).astype(np.float64)
    # The index of the first cell of each unit.
    units = {"": simple[0]} if simple else {}
    notes: dict[str, None] = {}
    has_mark = any(decimal in cells[index] for index in simple)
    for index in [] if len(simple) == len(present) else sorted(set(present) - set(simple)):
        parts = _split(cells[index])
        if parts is None or not pattern.fullmatch(parts.body):
            raise CellError(index, _problem(cells[index], cells, decimal, first))
        value = float(parts.body.replace(group, "").replace(decimal, "."))
        values[index] = -value if parts.negative else value
        has_mark |= decimal in parts.body
        if grouped := parts.group or (group if group in parts.body else ""):
            notes[f"thousands grouped by {_GROUP_NAMES.get(grouped, 'spaces')}"] = None
        notes |= dict.fromkeys(parts.notes)
        units[parts.unit] = min(index, units.get(parts.unit, index))
    _check_units(units)
    if (infinite := np.isinf(values)).any():
        raise CellError(int(infinite.argmax()), "is not finite")
    words = {cells[index] for index in set(range(len(cells))) - set(present)} if len(present) < len(cells) else set()
    words = sorted(word for word in words if word and word.casefold() != "nan")
    read = ["decimal commas"] if decimal == "," and has_mark else []
    read += [f"numbers in {unit}" for unit in units if unit]
    read += [f"{' and '.join(words[:3])} as gaps"] if words else []
    return Numbers(values, [*read, *notes])


def _check_units(units: Mapping[str, int]) -> None:
    """Rejects a second unit, and cells with and without a percent sign."""
    ordered = sorted(units, key=lambda unit: units[unit])
    named = [unit for unit in ordered if unit]
    if len(named) > 1:
        raise CellError(units[named[1]], f"is in {named[1]}, but cells above are in {named[0]}")
    if len(ordered) > 1 and named[0] in "%‰":
        has, above = ("has a", "have none") if ordered[1] else ("has no", "have one")
        raise CellError(units[ordered[1]], f"{has} sign {named[0]}, but cells above {above}")


def _problem(cell: str, cells: Sequence[str], decimal: str, first: int | None) -> str:
    if cell in _EXCEL_ERRORS:
        return "is an error of the spreadsheet; correct it, or empty the cell"
    if cell.lower().lstrip("+-") in ("inf", "infinity"):
        return "is not finite; leave the cell of a gap empty"
    if looks_like_number(cell):
        decided = "" if first is None else f", which {cells[first]!r} above has"
        return f"is not a number with a decimal {_MARK_NAMES[decimal]}{decided}"
    return "is not a number"
