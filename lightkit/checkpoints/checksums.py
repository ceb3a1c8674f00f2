"""Notices that a checkpoint is no longer what was written, whatever bit of it has changed.

A checkpoint is a zip archive, which may end in a comment: here it is the CRC-32 of every byte before it, which no
change of one bit leaves as it was, nor any of up to 32 bits that lie together. Stock torch and Lightning load such a
file as any other. It is no signature: it finds damage, not a forger. An archive without the comment has a CRC-32 for
each of its records, which torch does not look at; here they are.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

_COMMENT = b"crc32 of all before: "
_DIGITS = 8
_SIZE = len(_COMMENT) + _DIGITS

# What a zip archive begins with, and the record at its end with no comment after it.
_ARCHIVE = b"PK\3\4"
_END = b"PK\5\6"
_END_SIZE = 22

# The attribute of a record by which MS-DOS knows directories.
_DIRECTORY = 0x10

_CHUNK = 1 << 22


def write_with_checksum(stream: BinaryIO, archive: memoryview) -> None:
    """Writes a zip archive without a comment, and its checksum as the comment; anything else as it is."""
    end = bytes(archive[-_END_SIZE:])
    if bytes(archive[:4]) != _ARCHIVE or end[:4] != _END or end[-2:] != b"\0\0":
        stream.write(archive)
        return
    length = _SIZE.to_bytes(2, "little")
    checksum = zlib.crc32(length, zlib.crc32(archive[:-2]))
    stream.write(archive[:-2])
    stream.write(length + _COMMENT + f"{checksum:0{_DIGITS}x}".encode())


def find_damage(path: str | Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None.

    Every byte is looked at where the file has a checksum; the content of each record where it is an archive without
    one, and nothing where it is neither, as torch wrote them before 1.6.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return find_damage_in(file)


def find_damage_in(file: BinaryIO) -> str | None:
    """Returns the same of a file that is open for reading; its place is moved."""
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
    checksum, buffer = 0, memoryview(bytearray(min(_CHUNK, max(size, 1))))
    while size > 0 and (count := file.readinto(buffer[: min(size, len(buffer))])):
        checksum = zlib.crc32(buffer[:count], checksum)
        size -= count
    return checksum


def _damaged_record(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            # torch writes zeros where it was told to compute none: torch.serialization.set_crc32_options(False).
            if not any(record.CRC for record in archive.infolist()):
                return None
            # What is marked as a directory torch does not read: it hands out memory as it finds it.
            marked = next((record.filename for record in archive.infolist() if record.external_attr & _DIRECTORY), None)
            record = marked or archive.testzip()
    except Exception as error:
        # The module has half a dozen types for what a changed header makes of a file.
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"the checksum of its record {record} is not that of its content" if record else None
