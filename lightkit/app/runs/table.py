"""Runs as a table for a terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from lightkit._util import strict_json
from lightkit._util.numbers import format_number
from lightkit._util.printable import printable
from lightkit.app.runs.differences import uncommon_settings
from lightkit.app.runs.summary import RunSummary

_GAP = "  "

# The columns that a narrow terminal cuts, and the fewest characters that they keep.
_CUT_COLUMNS = ("differs", "run", "error")
_FEWEST = 12


def run_rows(
    runs: Sequence[RunSummary], metrics: Sequence[str], root: Path, among: Sequence[RunSummary] | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each run, as plain values.

    Args:
        runs: the runs.
        metrics: the names of the metrics that get a column.
        root: the directory to which the paths are relative.
        among: the runs, ``runs`` included, from which the settings of a run may differ; None for ``runs`` alone.
    """
    others = runs if among is None else among
    differences = {run.directory: differs for run, differs in zip(others, uncommon_settings(others), strict=True)}
    return [
        {
            "run": _relative(run.directory, root),
            "name": run.name,
            "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started)),
            "state": run.state,
            **{metric: run.metrics.get(metric) for metric in metrics},
            "seconds": run.metrics.get("wall_seconds"),
            "tags": run.tags,
            "differs": differences[run.directory],
            "error": run.error,
        }
        for run in runs
    ]


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as a JSON array."""
    return strict_json.dumps(list(rows), indent=1) + "\n"


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as CSV with a line of names; lists and dicts are texts with semicolons."""
    text = io.StringIO(newline="")
    # A line that ends in \r\n shows a stray character in most tools of a shell.
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def as_table(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """Returns rows as aligned columns; a column without a value is left out.

    Args:
        rows: the rows.
        width: the number of characters of a line, to which long columns are cut; None for no limit.
    """
    names = [name for name in (rows[0] if rows else {}) if any(_shown(row[name]) for row in rows)]
    cells = {name: [printable(name), *(printable(_shown(row[name])) for row in rows)] for name in names}
    widths = {name: max(map(cell_len, column)) for name, column in cells.items()}
    for name in _CUT_COLUMNS:
        excess = sum(widths.values()) + len(_GAP) * (len(widths) - 1) - (width or 0)
        if width is not None and excess > 0 and name in widths:
            widths[name] = max(min(_FEWEST, widths[name]), widths[name] - excess)
    numbers = {name for name in names if any(isinstance(row[name], float) for row in rows)}
    lines = []
    for place in range(len(rows) + 1):
        parts = []
        for name in names:
            text = cells[name][place]
            # A run's path is copied from its end.
            cut = text if cell_len(text) <= widths[name] else set_cell_size(text, widths[name] - 1) + "…"
            space = " " * (widths[name] - cell_len(cut))
            parts.append(space + cut if name in numbers else cut + space)
        lines.append(_GAP.join(parts).rstrip() + "\n")
    return "".join(lines)


def _relative(directory: Path, root: Path) -> str:
    try:
        return str(directory.relative_to(root))
    except ValueError:
        return str(directory)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, dict):
        return " ".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return ";".join(f"{name}={part}" for name, part in value.items())
    return ";".join(map(str, value)) if isinstance(value, list) else value
