"""Decides whether the first line of a table names the columns or has values."""

from __future__ import annotations

from pathlib import Path

from lightkit.data.advice import advise
from lightkit.data.tables.cell_kinds import kind_of
from lightkit.data.tables.grid import Grid
from lightkit.errors import DataError

# The rows below the first with which it is compared.
_SAMPLE = 20


def split_header(grid: Grid, header: bool | None, path: Path) -> tuple[list[str], int]:
    """Returns the names of the columns, and the index of the first row of values.

    A first line with a date above dates has values, and so has no names. A first line of numbers alone may be either,
    since years name columns.

    Args:
        grid: the cells. The function adds a note for a file without names.
        header: True if the first line has the names, False if it has values; None decides.
        path: the file, for messages.

    Raises:
        DataError: ``header`` is None and nothing decides, or the table has no rows.
    """
    first = grid.row(0)
    if header is None:
        header = _has_names(grid, first, path)
    if header:
        if len(grid) == 1:
            raise DataError(f"{path} has a header and no rows")
        return first, 1
    names = [f"column{number}" for number in range(1, len(first) + 1)]
    grid.notes.append(f"no header, columns {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    return names, 0


def _has_names(grid: Grid, first: list[str], path: Path) -> bool:
    kinds = [kind_of(cell) for cell in first]
    if "text" in kinds and "date" not in kinds:
        return True
    below = [_kind_below(grid, column) for column in range(len(first))]
    pairs = list(zip(kinds, below, strict=True))
    if ("date", "date") in pairs and all(kind == other or "gap" in (kind, other) for kind, other in pairs):
        return False
    # Programs leave the name of the first column empty, above the numbers of the rows.
    if "text" in kinds or (len(first) > 1 and not first[0]):
        return True
    if any(kind != other for kind, other in pairs if "gap" not in (kind, other)):
        return True
    raise DataError(
        f"{path} has no header: {grid.unit} {grid.lines[0]} must name the columns, it has {', '.join(first)}; "
        f"{advise('header=false')} takes it for values, {advise('header=true')} for names"
    )


def _kind_below(grid: Grid, column: int) -> str:
    """Returns the most frequent kind of the first cells below the first that are no gaps."""
    kinds = [kind_of(cell.strip()) for cell in grid.columns[column][1 : 1 + _SAMPLE]]
    present = [kind for kind in kinds if kind != "gap"]
    return max(present, key=present.count) if present else "gap"
