"""Checksums of checkpoints, which detect damage.

A checkpoint is a zip archive, and a zip archive may end in a comment. The comment is the CRC-32 of every byte before
it, which detects any changed bit and any change within 32 consecutive bits. Stock torch and Lightning load the file as
any other. The checksum is no signature: it does not detect a forgery. In an archive without the comment each record has
a CRC-32, which torch does not compare and `find_damage` does.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

_COMMENT = b"crc32 of all before: "
_DIGITS = 8
_SIZE = len(_COMMENT) + _DIGITS

# The beginning of a zip archive, and of the record at its end, which has this size without a comment.
_ARCHIVE = b"PK\3\4"
_END = b"PK\5\6"
_END_SIZE = 22

# The MS-DOS attribute of a directory.
_DIRECTORY = 0x10

_CHUNK = 1 << 22


def write_with_checksum(stream: BinaryIO, archive: memoryview) -> None:
    """Writes ``archive`` to ``stream`` with its checksum as the comment of the zip archive.

    Data that is no zip archive, or an archive that already has a comment, is written unchanged.
    """
    end = bytes(archive[-_END_SIZE:])
    if bytes(archive[:4]) != _ARCHIVE or end[:4] != _END or end[-2:] != b"\0\0":
        stream.write(archive)
        return
    length = _SIZE.to_bytes(2, "little")
    checksum = zlib.crc32(length, zlib.crc32(archive[:-2]))
    stream.write(archive[:-2])
    stream.write(length + _COMMENT + f"{checksum:0{_DIGITS}x}".encode())


def find_damage(path: str | Path) -> str | None:
    """Returns the damage of a checkpoint as a sentence, such as "its checksum is not that of its content".

    The checksum of a file covers every byte. In an archive without a checksum the function checks the content of each
    record. In a file that is no archive, the format of torch before 1.6, it checks nothing.

    Returns:
        The sentence; None if the function found no damage.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return find_damage_in(file)


def find_damage_in(file: BinaryIO) -> str | None:
    """Returns the damage or None, as `find_damage`, for a file that is open for reading; moves its position."""
    file.seek(0)
    begin = file.read(4)
    size = file.seek(0, 2)
    file.seek(max(0, size - _SIZE))
    comment = file.read()
    if size == 0:
        return "it is empty"
    if comment.startswith(_COMMENT):
        file.seek(0)
        wrong = _crc32(file, size - _SIZE) != _number(comment[len(_COMMENT) :])
        return "its checksum is not that of its content" if wrong else None
    return _damaged_record(file) if begin == _ARCHIVE else None


def _number(digits: bytes) -> int | None:
    return int(digits, 16) if re.fullmatch(rb"[0-9a-f]+", digits) else None


def _crc32(file: BinaryIO, size: int) -> int:
    # The files are io.BufferedReader, whose readinto the type BinaryIO lacks.
    readinto = cast(io.BufferedReader, file).readinto
    checksum, buffer = 0, memoryview(bytearray(min(_CHUNK, max(size, 1))))
    while size > 0 and (count := readinto(buffer[: min(size, len(buffer))])):
        checksum = zlib.crc32(buffer[:count], checksum)
        size -= count
    return checksum


def _damaged_record(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            # torch writes zeros after torch.serialization.set_crc32_options(False).
            if not any(record.CRC for record in archive.infolist()):
                return None
            # torch reads no record that is marked as a directory, and returns uninitialized memory for it.
            marked = next((record.filename for record in archive.infolist() if record.external_attr & _DIRECTORY), None)
            record = marked or archive.testzip()
    except Exception as error:
        # zipfile raises half a dozen types of exceptions for a damaged header.
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"the checksum of its record {record} is not that of its content" if record else None
