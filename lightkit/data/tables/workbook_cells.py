"""Reads the cells of a sheet of an .xlsx workbook, as the text that a CSV file would have.

The values are those that the spreadsheet has stored: nothing is computed, no macro runs and no link is followed.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from lightkit._util.installation import how_to_install
from lightkit.data.advice import advise
from lightkit.data.tables import grid as limits
from lightkit.data.tables.file_content import MAX_BYTES
from lightkit.data.tables.grid import Grid
from lightkit.data.tables.settings import TableSettings
from lightkit.errors import DataError

# Limits of a workbook: the parts of its archive, the tags of all parts together, and the rows of a sheet.
_MAX_PARTS, _MAX_TAGS, _MAX_ROWS = 10_000, 60_000_000, 1 << 20

# A part that declares entities may grow without end while it is parsed; Excel writes none.
_DECLARATION = re.compile(rb"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)

_CHUNK = 1 << 20


def read_workbook(content: bytes, settings: TableSettings, path: Path) -> Grid:
    """Reads a sheet; empty rows above the table, and empty rows and columns around it, are left out.

    Args:
        content: the bytes of the file.
        settings: the settings, of which ``sheet`` and ``skip_lines`` are read.
        path: the file, for messages.

    Raises:
        DataError: openpyxl is missing, the file is no workbook or exceeds a limit, or ``sheet`` is needed.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(f"reading {path}, a workbook, needs openpyxl: {how_to_install('app')}") from error
    try:
        _check_archive(content, path)
        with warnings.catch_warnings():
            # openpyxl warns of what it leaves out, such as styles, which no table needs.
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True, keep_links=False)
            name, rows, lines = _choose_sheet(book, settings, path)
    except DataError:
        raise
    # A damaged workbook raises errors of any type in openpyxl.
    except Exception as error:
        raise DataError(f"{path} is no workbook that can be read: {type(error).__name__}: {error}") from error
    width = max(map(len, rows))
    if settings.skip_lines is None and len(rows[0]) == 1 < width:
        # The last of the rows whose first cell alone is filled, such as a title.
        last = next(index for index, row in enumerate(rows) if len(row) > 1) - 1
        raise DataError(
            f"{path}, row {lines[0]}: 1 cell, but row {lines[last + 1]} has {len(rows[last + 1])}; "
            f"{advise(f'skip_lines={lines[last]}')} leaves out what is above the table"
        )
    filled = [row + [""] * (width - len(row)) for row in rows]
    columns = [np.array(column, dtype=object) for column in zip(*filled, strict=True)]
    columns = [column for column in columns if any(column)]
    return Grid(columns, np.array(lines), "row", notes=[f"sheet {name}"])


def _check_archive(content: bytes, path: Path) -> None:
    """Rejects an archive that is no workbook, or that takes too much memory when it is unpacked and parsed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if "[Content_Types].xml" not in names:
            advice = "save it as .xlsx or CSV" if "mimetype" in names else "unpack it"
            raise DataError(f"{path} is an archive and no workbook of Excel; {advice}")
        parts = archive.infolist()
        total = sum(part.file_size for part in parts)
        if len(parts) > _MAX_PARTS or total > MAX_BYTES:
            raise DataError(
                f"{path} has {len(parts):,} parts of {total:,} bytes; the limits of a workbook are {_MAX_PARTS:,} and "
                f"{MAX_BYTES:,}"
            )
        tags = 0
        for part in parts:
            if part.filename.lower().endswith((".xml", ".rels")):
                with archive.open(part) as stream:
                    # zipfile reads no more than the size that was added up above.
                    before = b""
                    while chunk := stream.read(_CHUNK):
                        tags += chunk.count(b"<")
                        # The end of the chunk before: a declaration may lie across both.
                        if b"\0" in chunk or _DECLARATION.search(before + chunk):
                            raise DataError(f"{path}: {part.filename} has a declaration that no workbook of Excel has")
                        before = chunk[-32:]
        if tags > _MAX_TAGS:
            raise DataError(f"{path} has {tags:,} elements, and no more than {_MAX_TAGS:,} are read")


def _choose_sheet(book: Any, settings: TableSettings, path: Path) -> tuple[str, list[list[str]], list[int]]:
    """Returns the name of the sheet, its rows and their numbers."""
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    wanted = settings.sheet
    if wanted is not None:
        if wanted not in sheets:
            raise DataError(f"{path} has no sheet {wanted!r}; it has {', '.join(sheets)}")
        sheets = {wanted: sheets[wanted]}
    found = {}
    for name, sheet in sheets.items():
        rows, lines = _read_rows(sheet, settings.skip_lines or 0, path)
        if rows:
            found[name] = (rows, lines)
        if len(found) > 1:
            raise DataError(f"{path} has several sheets: {', '.join(sheets)}; {advise('sheet=NAME')} chooses one")
    if not found:
        raise DataError(f"{path} is empty")
    ((name, (rows, lines)),) = found.items()
    return name, rows, lines


def _read_rows(sheet: Any, skipped: int, path: Path) -> tuple[list[list[str]], list[int]]:
    rows: list[list[str]] = []
    lines: list[int] = []
    cells = 0
    for line, values in enumerate(_rows_of(sheet), start=1):
        row = [_text(value) for value in values]
        while row and not row[-1]:
            row.pop()
        cells += len(values) + 1
        if cells > limits.MAX_CELLS or line > _MAX_ROWS:
            raise DataError(f"{path} has more than {limits.MAX_CELLS:,} cells or {_MAX_ROWS:,} rows, the limits")
        if line > skipped and (row or rows):
            rows.append(row)
            lines.append(line)
    while rows and not rows[-1]:
        rows.pop()
        lines.pop()
    return rows, lines


def _rows_of(sheet: Any) -> Iterator[tuple[Any, ...]]:
    # The size that a file declares need not be true.
    sheet.reset_dimensions()
    return sheet.iter_rows(values_only=True)


def _text(value: Any) -> str:
    """Returns the value of a cell as a CSV file would have it; an empty text for a formula without a stored value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(sep=" ")
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, (date, time, timedelta)):
        return str(value)
    return str(value).strip()
