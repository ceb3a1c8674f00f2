"""The options of a body that is a CSV file."""

from __future__ import annotations

from typing import Any

from lightkit.data.tables.settings import DECIMALS, SEPARATORS

# Content types of CSV files. A workbook, or a packed file, might become a thousand times as large as the body.
CSV_TYPES = ("text/csv", "text/plain", "text/tab-separated-values")

# Each is a field of `lightkit.data.tables.TableSettings`; the default is that of the training.
CSV_OPTIONS: dict[str, Any] = {
    "separator": {"type": "string", "description": f"CSV: {', '.join(SEPARATORS)} or another character of ASCII."},
    "decimal": {"type": "string", "enum": list(DECIMALS), "description": "CSV: the decimal mark."},
    "encoding": {"type": "string", "description": "CSV: the encoding, such as cp1252."},
    "header": {"type": "boolean", "description": "CSV: true if the first line names the columns."},
    "skip_lines": {"type": "integer", "minimum": 0, "description": "CSV: the number of lines above the table."},
    "day_first": {"type": "boolean", "description": "CSV: true if the day comes before the month in dates."},
}
