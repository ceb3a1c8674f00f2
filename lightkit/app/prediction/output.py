"""Files of predictions: CSV, or JSON by the suffix of the file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightkit._util import strict_json
from lightkit._util.atomic_write import write_text_atomically

_JSON, _LINES = ".json", (".jsonl", ".ndjson")


def is_json(path: Path) -> bool:
    """Returns True if the suffix of a file is that of JSON, or of JSON in lines."""
    return path.suffix.lower() in (_JSON, *_LINES)


def write_json(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes entries as a JSON list; as one object a line if the suffix is ``.jsonl`` or ``.ndjson``."""
    if path.suffix.lower() in _LINES:
        text = "".join(strict_json.dumps(entry) + "\n" for entry in entries)
    else:
        text = strict_json.dumps(list(entries), indent=1) + "\n"
    write_text_atomically(path, text)


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows below a header as CSV."""
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
        write_text_atomically(path, file.getvalue())
