"""Cuts a text into cells: finds the lines of the table and the separator, and checks the length of each row."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightkit._util.installation import how_to_install
from lightkit.data.advice import advise
from lightkit.data.tables import grid as limits
from lightkit.data.tables.cell_kinds import kind_of
from lightkit.data.tables.file_content import Text
from lightkit.data.tables.grid import Grid
from lightkit.data.tables.numbers import looks_like_number
from lightkit.data.tables.settings import TableSettings
from lightkit.errors import DataError

# Where candidates are equally good, the first is taken.
_CANDIDATES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}

# The characters of the text, and the rows, from which the separator is found.
_SAMPLE, _SAMPLE_ROWS = 1 << 16, 200

_BLANK = " \t,;|\n"


def read_text(text: Text, settings: TableSettings, path: Path) -> Grid:
    """Cuts a text into rows of cells.

    Args:
        text: the decoded text.
        settings: the settings, of which ``separator`` and ``skip_lines`` are read.
        path: the file, for messages.

    Raises:
        DataError: the text is empty, has too many cells, a row of another length than the first, or a lone quote.
    """
    body, skipped, separator = _find_table(text.text, settings, path)
    if separator is None:
        separator = settings.separator or _find_separator(body)
    body = body[: _end_of_table(body, separator)]
    if not body:
        raise DataError(f"{path} is empty")
    widths, lines = _measure(body, separator, path, skipped)
    lines += skipped
    _check_widths(body, widths, lines, path)
    notes = [] if text.encoding is None else [text.encoding]
    if separator != ",":
        notes.append(f"separated by {_CANDIDATES.get(separator, repr(separator))}")
    # Excel writes semicolons, and tabs in UTF-16, with the marks of a country; other programs write tabs with points.
    points = separator == "," or (separator != ";" and text.encoding is None)
    return Grid(_cells(body, separator, int(widths[0]), len(lines), path), lines, "line", points, notes)


def _find_table(text: str, settings: TableSettings, path: Path) -> tuple[str, int, str | None]:
    """Returns the text of the table, the number of lines above it, and the separator that a line ``sep=`` declares."""
    separator, start, skipped = None, 0, 0
    declared = text[: text.find("\n")].strip('" ') if "\n" in text[:8] else ""
    if declared[:4].lower() == "sep=" and len(declared) == 5:
        start, skipped = _next_line(text, 0), 1
        separator = settings.separator or declared[4]
    if settings.skip_lines is not None:
        for _ in range(settings.skip_lines):
            if start == len(text):
                raise DataError(f"{path} has no more lines than skip_lines={settings.skip_lines} leaves out")
            start = _next_line(text, start)
        return text[start:], skipped + settings.skip_lines, separator
    while start < len(text):
        following = _next_line(text, start)
        line = text[start:following]
        if line.startswith("#") and _names_columns(line, text[following : _next_line(text, following)]):
            # NumPy writes such a line.
            return text[start:].lstrip("# "), skipped, separator
        if line.strip(_BLANK) and not line.startswith("#"):
            break
        start, skipped = following, skipped + 1
    return text[start:], skipped, separator


def _next_line(text: str, start: int) -> int:
    """Returns the index at which the line after that at ``start`` begins; the length of the text for none."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end + 1


def _names_columns(comment: str, following: str) -> bool:
    """Returns True if a line that begins with ``#`` has as many cells as the line that follows it, and several."""
    return any(comment.count(mark) == following.count(mark) > 0 for mark in _CANDIDATES)


def _find_separator(text: str) -> str:
    """Returns the candidate that cuts the most lines as it cuts the first, and of those the one with most numbers."""
    sample = text[:_SAMPLE]
    if len(text) > _SAMPLE and "\n" in sample:
        sample = sample[: sample.rindex("\n")]
    scores = {}
    for mark in _CANDIDATES:
        if mark in sample:
            reader = csv.reader(io.StringIO(sample, newline=""), delimiter=mark, skipinitialspace=True)
            try:
                rows = [row for row, _ in zip(reader, range(_SAMPLE_ROWS), strict=False) if any(row)]
            except csv.Error:
                continue
            scores[mark] = _score(rows)
    return max(scores, key=lambda mark: scores[mark], default=",")


def _score(rows: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    if not rows:
        return (0, 0, 0)
    widths = Counter(map(len, rows))
    first = widths[len(rows[0])] / len(rows) if len(rows[0]) > 1 else 0
    cells = [cell.strip() for row in rows[1:] or rows for cell in row]
    known = sum(kind_of(cell) != "text" for cell in cells) / len(cells) if cells else 0
    width, count = widths.most_common(1)[0]
    return (first, known, count / len(rows) if width > 1 else 0)


def _end_of_table(text: str, separator: str) -> int:
    """Returns the number of characters before the lines at the end that have no cell with content."""
    end = len(text)
    while end > 0:
        start = text.rfind("\n", 0, end) + 1
        if text[start:end].strip(separator + " \t"):
            break
        end = start - 1
    return max(end, 0)


def _measure(text: str, separator: str, path: Path, skipped: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of cells of each row and the line in which it ends, two int64 arrays."""
    if '"' in text:
        return _measure_quoted(text, separator, path, skipped)
    content = np.frombuffer(text.encode("utf-8") + b"\n", dtype=np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    marks = np.searchsorted(np.flatnonzero(content == ord(separator)), ends)
    widths = np.diff(marks, prepend=0) + 1
    widths[np.diff(ends, prepend=-1) == 1] = 0
    _check_count(int(widths.sum()) + len(widths), path)
    return widths, np.arange(1, len(ends) + 1)


def _measure_quoted(text: str, separator: str, path: Path, skipped: int) -> tuple[np.ndarray, np.ndarray]:
    widths, lines, cells = [], [], 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            widths.append(len(row))
            lines.append(reader.line_num)
            cells += len(row) + 1
            _check_count(cells, path)
    except csv.Error as error:
        line = (lines[-1] if lines else 0) + 1 + skipped
        raise DataError(
            f"{path}, line {line}: a quote is not closed, or has more text behind it; within a cell in quotes a quote "
            "is written twice"
        ) from error
    return np.array(widths), np.array(lines)


def _check_count(cells: int, path: Path) -> None:
    if cells > limits.MAX_CELLS:
        raise DataError(f"{path} has more than {limits.MAX_CELLS:,} cells, the limit of a file")


def _check_widths(text: str, widths: np.ndarray, lines: np.ndarray, path: Path) -> None:
    width = widths[0]
    # An empty line of a file with one column is an empty cell.
    if width > limits.MAX_COLUMNS:
        raise DataError(f"{path} has {width:,} columns, and no more than {limits.MAX_COLUMNS:,} are read")
    wrong = (widths != width) & ~((width == 1) & (widths == 0))
    if not wrong.any():
        return
    bad = int(wrong.argmax())
    advice = ""
    # Lines above the table have other lengths than those of the table.
    usual = Counter(widths[1:].tolist()).most_common(1)[0][0]
    head = int((widths == usual).argmax())
    if width == 1 and looks_like_number(text.split("\n", bad + 1)[bad].strip()):
        advice = f"; {advise('separator=semicolon')} reads one column of numbers with decimal commas"
    elif width < usual:
        advice = f"; {advise(f'skip_lines={lines[head] - 1}')} leaves out the lines above line {lines[head]}"
    raise DataError(f"{path}, line {lines[bad]}: {widths[bad]} cells, but the header has {width}{advice}")


def _cells(text: str, separator: str, width: int, rows: int, path: Path) -> list[np.ndarray]:
    """Returns the columns of a text whose rows were checked."""
    try:
        import pandas
    except ImportError as error:
        raise DataError(f"reading tables needs pandas: {how_to_install('app')}") from error
    try:
        frame = pandas.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            names=list(range(width)),
            index_col=False,
            dtype=object,
            na_filter=False,
            skip_blank_lines=False,
            skipinitialspace=True,
            engine="c",
        )
    except (ValueError, UnicodeError) as error:
        raise DataError(f"{path} is not a CSV file: {error}") from error
    if len(frame) != rows:
        raise DataError(f"{path} is not a CSV file: its quotes leave open where {rows} rows end")
    return [frame[index].to_numpy(dtype=object) for index in range(width)]
