"""The settings that say how a table is written, each of which the reader finds by itself if it is None."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from typing import Any

from lightkit.errors import DataError

# Words for the characters that Hydra's command line would take for its own.
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
DECIMALS = {"point": ".", "comma": ","}

# Some other codecs of Python, such as idna and unicode_escape, take time that grows with the square of the size, or
# give a text in which the separators of the file are lost.
_ENCODINGS = re.compile(r"(ascii|utf-8(-sig)?|utf-16|utf-32|cp|iso8859|mac-|koi8|shift_jis|gb|big5|euc_|hz|johab).*")


@dataclass(frozen=True)
class TableSettings:
    """The settings of a table; None of each finds it in the file.

    Args:
        separator: the separator of the cells: ``"comma"``, ``"semicolon"``, ``"tab"``, ``"pipe"``, or another
            character of ASCII.
        decimal: the decimal mark of numbers, ``"point"`` or ``"comma"``; the other mark may group thousands then.
        encoding: the name of the encoding, such as ``"cp1252"``.
        header: True if the first line names the columns, False if it has values.
        skip_lines: the number of lines above the table. None skips empty lines and lines that begin with ``#``.
        sheet: the name of the sheet of a workbook; None takes the only sheet that has cells.
        day_first: True if ``01/02/2020`` is the first of February, False if it is the second of January.

    Raises:
        DataError: a setting has an unknown value.
    """

    separator: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    header: bool | None = None
    skip_lines: int | None = None
    sheet: str | None = None
    day_first: bool | None = None

    def __post_init__(self) -> None:
        if self.separator is not None:
            object.__setattr__(self, "separator", _separator(self.separator))
        if self.decimal is not None:
            object.__setattr__(self, "decimal", _decimal(self.decimal))
        if self.encoding is not None:
            object.__setattr__(self, "encoding", _encoding(self.encoding))
        for name in ("header", "day_first"):
            if (value := getattr(self, name)) not in (None, True, False):
                raise DataError(f"{name} must be true, false or null, got {value!r}")
        if self.skip_lines is not None and (type(self.skip_lines) is not int or self.skip_lines < 0):
            raise DataError(f"skip_lines must be a number of lines, got {self.skip_lines!r}")


def _separator(value: Any) -> str:
    found = SEPARATORS.get(value, value) if isinstance(value, str) else ""
    found = "\t" if found == r"\t" else found
    if len(found) != 1 or found.isalnum() or not found.isascii() or found in "\"'.+- \n\r\f\v\0":
        raise DataError(f"separator must be {', '.join(SEPARATORS)} or another ASCII character, got {value!r}")
    return found


def _decimal(value: Any) -> str:
    found = DECIMALS.get(value, value) if isinstance(value, str) else ""
    if found not in DECIMALS.values():
        raise DataError(f"decimal must be {' or '.join(DECIMALS)}, got {value!r}")
    return found


def _encoding(value: Any) -> str:
    try:
        name = codecs.lookup(value).name if isinstance(value, str) else ""
    except (LookupError, ValueError, UnicodeError):
        name = ""
    if not _ENCODINGS.fullmatch(name):
        raise DataError(f"encoding must be the name of an encoding such as utf-8, cp1252 or utf-16, got {value!r}")
    return name
