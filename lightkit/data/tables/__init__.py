"""Reads tables as people export them: CSV files of any country, packed by gzip or not, and .xlsx workbooks.

`read_table` finds encoding, separator and header; the columns of the `Table` find decimal marks and layouts of dates.
What cannot be found is an error that names the setting which decides. A file computes nothing, and its size is bounded.
"""

from __future__ import annotations

from pathlib import Path

from lightkit.data.tables.file_content import WORKBOOK, decode, read_content
from lightkit.data.tables.headers import split_header
from lightkit.data.tables.numbers import Numbers
from lightkit.data.tables.settings import TableSettings
from lightkit.data.tables.table import Table
from lightkit.data.tables.text_cells import read_text
from lightkit.data.tables.times import Times
from lightkit.data.tables.workbook_cells import read_workbook

__all__ = ["Numbers", "Table", "TableSettings", "Times", "parse_csv", "read_table"]


def read_table(path: str | Path, settings: TableSettings | None = None) -> Table:
    """Reads the table in a file.

    Args:
        path: a regular file: CSV in UTF-8, UTF-16, cp1252 or another encoding, also packed by gzip; or a workbook in
            the format of Excel 2007, .xlsx.
        settings: how the table is written; None finds everything.

    Raises:
        DataError: the file cannot be read, is no table, or a setting is needed. The message names the line.
    """
    path = Path(path)
    settings = settings or TableSettings()
    content, packed = read_content(path)
    if not content.startswith(WORKBOOK):
        table = parse_csv(content, settings, path)
    else:
        grid = read_workbook(content, settings, path)
        names, start = split_header(grid, settings.header, path)
        table = Table(path, names, grid, start, settings)
    if packed:
        table.notes.insert(0, "gzip")
    return table


def parse_csv(content: bytes, settings: TableSettings, path: Path) -> Table:
    """Reads the table in the content of a CSV file.

    Args:
        content: the bytes of the text.
        settings: how the table is written.
        path: the name of the table in messages.

    Raises:
        DataError: the content is no table, or a setting is needed. The message names the line.
    """
    grid = read_text(decode(content, settings.encoding, path), settings, path)
    names, start = split_header(grid, settings.header, path)
    return Table(path, names, grid, start, settings)
