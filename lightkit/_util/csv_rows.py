"""Reads the rows of a ``metrics.csv`` that are whole."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads the rows of the ``metrics.csv`` at ``path`` that have every column and a whole number as ``step``.

    Returns:
        A dict for each row, which maps column names to strings; an empty list if the file does not exist or has another
        format.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return []
    # A last line without its end may contain half a number.
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    return [row for row in rows if (row.get("step") or "").isdecimal() and None not in row and None not in row.values()]
