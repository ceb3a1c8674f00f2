"""Reads the bytes of a table, and decodes those of a text."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from lightkit._util.regular_files import open_regular
from lightkit.data.advice import advise
from lightkit.errors import DataError

# The limit in bytes of a file, and of what it is compressed from.
MAX_BYTES = 512 << 20

WORKBOOK = b"PK\x03\x04"
_GZIP = b"\x1f\x8b"

_SIGNATURES = (
    (b"\xd0\xcf\x11\xe0", "a workbook of Excel 97 to 2003; save it as .xlsx or CSV"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"PAR1", "a Parquet file; save it as CSV"),
    (b"\x89HDF", "an HDF5 file; save it as CSV"),
    (b"\x93NUMPY", "an array of NumPy; save it as CSV"),
    (b"BZh", "compressed by bzip2; gzip would be read"),
    (b"\xfd7zXZ", "compressed by xz; gzip would be read"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard; gzip would be read"),
)
_MARKUP = re.compile(r"\s*<(!doctype|html|table|\?xml)", re.IGNORECASE)

# The longer mark comes first: that of UTF-32 begins like that of UTF-16.
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8", None),
    (b"\xff\xfe\0\0", "utf-32", "UTF-32"),
    (b"\0\0\xfe\xff", "utf-32", "UTF-32"),
    (b"\xff\xfe", "utf-16", "UTF-16"),
    (b"\xfe\xff", "utf-16", "UTF-16"),
)


@dataclass(frozen=True)
class Text:
    """A decoded text.

    Attributes:
        text: the text; a line feed ends each line.
        encoding: the encoding as the user's line names it; None for UTF-8.
    """

    text: str
    encoding: str | None


def read_content(path: Path) -> tuple[bytes, bool]:
    """Returns the content of a file, unpacked if gzip has packed it, and True if it was packed.

    Raises:
        DataError: the file cannot be read, is too large, or is of a known kind that is no table.
    """
    try:
        with open_regular(path, MAX_BYTES) as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    packed = content.startswith(_GZIP)
    if packed:
        content = _unpack(content, path)
    for signature, kind in _SIGNATURES:
        if content.startswith(signature):
            raise DataError(f"{path} is no table: it is {kind}")
    return content, packed


def _unpack(content: bytes, path: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from error
    if len(unpacked) > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES:,} bytes when it is unpacked, the limit of a file")
    return unpacked


def decode(content: bytes, encoding: str | None, path: Path) -> Text:
    """Decodes the text of a table: by a byte-order mark, else as UTF-8, else as cp1252.

    Args:
        content: the bytes of the file.
        encoding: the encoding that the user sets; None finds it.
        path: the file, for messages.

    Raises:
        DataError: the bytes are no text, or no text in ``encoding``.
    """
    mark = next((entry for entry in _BYTE_ORDER_MARKS if content.startswith(entry[0])), None)
    name: str | None
    if encoding is not None:
        name = None if encoding.startswith("utf-8") else encoding
        text = _decoded(content, encoding, path)
    elif mark is not None:
        name = mark[2]
        text = _decoded(content, mark[1], path)
    else:
        text, name = _guessed(content, path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        advice = f"; {advise('encoding=utf-16-le')} reads UTF-16 without a byte-order mark" if _is_wide(content) else ""
        raise DataError(f"{path} is not a CSV file: line {line} has a NUL character{advice}")
    if _MARKUP.match(text[:1000]):
        raise DataError(f"{path} is no table: it is a page of HTML or XML; save it as CSV")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # A byte-order mark is no part of the first name.
    return Text(text.removeprefix("\ufeff"), name)


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not a text in {encoding}: line {line} has the byte 0x{error.object[error.start]:02x}"
        ) from error


def _guessed(content: bytes, path: Path) -> tuple[str, str | None]:
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    # Texts have no other control characters than these.
    if any(byte < 32 and byte not in b"\t\n\f\r\x1a" for byte in set(content)) and b"\0" not in content:
        raise DataError(f"{path} is not a CSV file: it has control characters, as no text has")
    try:
        return content.decode("cp1252"), "cp1252"
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is a text neither in UTF-8 nor in cp1252 (line {line}): {advise('encoding=NAME')} names another"
        ) from error


def _is_wide(content: bytes) -> bool:
    odd = content[1:2000:2]
    return odd.count(0) > len(odd) // 2
