"""The records of a snapshot or a log, each with a checksum; a reader finds the next record after damaged bytes.

A record has a header, a text, the bytes of tensors, and a trailer. The header begins with the magic of the file, 8
bytes. The trailer has the CRC-32 of all bytes of the record before it, and the complement of the magic. Each log has a
random magic of its own, so that no pushed bytes can look like a record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

# Magic, sequence number, bytes of the text, bytes of the tensors.
_HEADER = struct.Struct("<8sQQQ")
# Checksum, complement of the magic.
_TRAILER = struct.Struct("<I8s")

MAGIC_BYTES = 8

# Bytes read at a time.
_CHUNK = 1 << 20


class Record(NamedTuple):
    """The place of a complete record in a file; all offsets are in bytes from the start of the file.

    Args:
        sequence: the sequence number of the record.
        text: the offset of the text.
        body: the offset of the bytes of the tensors.
        trailer: the offset of the trailer.
        end: the offset after the trailer.
    """

    sequence: int
    text: int
    body: int
    trailer: int
    end: int


def write_record(stream: BinaryIO, magic: bytes, sequence: int, text: bytes, parts: Iterable[memoryview]) -> None:
    """Writes a record at the position of the stream.

    Args:
        stream: the file.
        magic: the magic of the file, 8 bytes.
        sequence: the sequence number of the record.
        text: the text of the record.
        parts: the bytes of the tensors.
    """
    parts = list(parts)
    checksum = 0
    for part in (_HEADER.pack(magic, sequence, len(text), sum(map(len, parts))), text, *parts):
        checksum = zlib.crc32(part, checksum)
        stream.write(part)
    stream.write(_TRAILER.pack(checksum, _complement(magic)))


def find_record(stream: BinaryIO, start: int, magic: bytes) -> Record | None:
    """Returns the record at the offset ``start``; None if there is no record, an incomplete one or a damaged one."""
    size = os.fstat(stream.fileno()).st_size
    stream.seek(start)
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(magic):
        return None
    _, sequence, text_bytes, body_bytes = _HEADER.unpack(header)
    text = start + _HEADER.size
    body, trailer = text + text_bytes, text + text_bytes + body_bytes
    if trailer + _TRAILER.size > size:
        return None
    checksum, left = zlib.crc32(header), trailer - text
    while left:
        part = stream.read(min(left, _CHUNK))
        if not part:
            return None
        checksum = zlib.crc32(part, checksum)
        left -= len(part)
    if stream.read(_TRAILER.size) != _TRAILER.pack(checksum, _complement(magic)):
        return None
    return Record(sequence, text, body, trailer, trailer + _TRAILER.size)


def find_record_after(stream: BinaryIO, start: int, magic: bytes, sequence: int) -> Record | None:
    """Returns the first complete record at or after the offset ``start`` with a sequence number above ``sequence``.

    Returns:
        The record; None if the file has no such record.
    """
    while (start := _find(stream, start, magic)) >= 0:
        record = find_record(stream, start, magic)
        if record is not None and record.sequence > sequence:
            return record
        start += 1
    return None


def ends_in_trailer(stream: BinaryIO, magic: bytes) -> bool:
    """Returns True if the file ends in a trailer, so that the last record was written to its end, damaged or not."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - len(magic)))
    return stream.read() == _complement(magic)


def _complement(magic: bytes) -> bytes:
    return bytes(255 - byte for byte in magic)


def _find(stream: BinaryIO, start: int, magic: bytes) -> int:
    stream.seek(start)
    kept = b""
    while part := stream.read(_CHUNK):
        kept += part
        if (found := kept.find(magic)) >= 0:
            return start + found
        # The magic may lie across two chunks.
        start += len(kept) - len(magic) + 1 if len(kept) >= len(magic) else 0
        kept = kept[-len(magic) + 1 :]
    return -1
