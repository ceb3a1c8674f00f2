"""Records of a file: each with a checksum, and found again behind damage.

A record is a head with a mark, a text, the bytes of tensors, and a tail: the checksum of all before it, and the mark
with its bits turned. A log has a mark of its own, so that nothing that was pushed can look like a record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

# Of a record: mark, number, bytes of its text, bytes of its tensors.
_HEAD = struct.Struct("<8sQQQ")
# Checksum, turned mark.
_TAIL = struct.Struct("<I8s")

MARK_BYTES = 8

# Bytes read at a time.
_CHUNK = 1 << 20


class Record(NamedTuple):
    """A whole record in a file: its number, and where its text, its tensors and its tail begin and end."""

    number: int
    text: int
    body: int
    tail: int
    end: int


def write_record(stream: BinaryIO, mark: bytes, number: int, text: bytes, parts: Iterable[memoryview]) -> None:
    """Writes a record at the place of the stream.

    Args:
        stream: of the file.
        mark: of its records, 8 bytes.
        number: of the record.
        text: its text.
        parts: the bytes of its tensors.
    """
    parts = list(parts)
    checksum = 0
    for part in (_HEAD.pack(mark, number, len(text), sum(map(len, parts))), text, *parts):
        checksum = zlib.crc32(part, checksum)
        stream.write(part)
    stream.write(_TAIL.pack(checksum, _turned(mark)))


def find_record(stream: BinaryIO, start: int, mark: bytes) -> Record | None:
    """Returns the record at an offset, or None where there is none, or one that is not as it was written."""
    size = os.fstat(stream.fileno()).st_size
    stream.seek(start)
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(mark):
        return None
    _, number, text_bytes, body_bytes = _HEAD.unpack(head)
    text = start + _HEAD.size
    body, tail = text + text_bytes, text + text_bytes + body_bytes
    if tail + _TAIL.size > size:
        return None
    checksum, left = zlib.crc32(head), tail - text
    while left:
        part = stream.read(min(left, _CHUNK))
        if not part:
            return None
        checksum = zlib.crc32(part, checksum)
        left -= len(part)
    if stream.read(_TAIL.size) != _TAIL.pack(checksum, _turned(mark)):
        return None
    return Record(number, text, body, tail, tail + _TAIL.size)


def find_record_after(stream: BinaryIO, start: int, mark: bytes, number: int) -> Record | None:
    """Returns the first whole record that begins at an offset or later and has a higher number, or None."""
    while (start := _find(stream, start, mark)) >= 0:
        record = find_record(stream, start, mark)
        if record is not None and record.number > number:
            return record
        start += 1
    return None


def ends_in_a_tail(stream: BinaryIO, mark: bytes) -> bool:
    """Returns whether the last record of the file was written to its end, whatever has become of it."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - len(mark)))
    return stream.read() == _turned(mark)


def _turned(mark: bytes) -> bytes:
    return bytes(255 - byte for byte in mark)


def _find(stream: BinaryIO, start: int, mark: bytes) -> int:
    stream.seek(start)
    kept = b""
    while part := stream.read(_CHUNK):
        kept += part
        if (found := kept.find(mark)) >= 0:
            return start + found
        # It may lie across two parts.
        start += len(kept) - len(mark) + 1 if len(kept) >= len(mark) else 0
        kept = kept[-len(mark) + 1 :]
    return -1
