"""Frames between the server and a worker: a header of JSON and bytes, on a socket of this machine."""

from __future__ import annotations

import asyncio
import json
import struct
from io import BufferedRWPair
from typing import Any

# The lengths of the header and of the bytes.
_LENGTHS = struct.Struct("!IQ")


def pack_header(header: dict[str, Any], length: int) -> bytes:
    """Returns the beginning of a frame, which ``length`` bytes follow."""
    text = json.dumps(header).encode()
    return _LENGTHS.pack(len(text), length) + text


def write_frame(stream: BufferedRWPair, header: dict[str, Any], content: bytes = b"") -> None:
    """Writes a frame and flushes the stream.

    Raises:
        OSError: the other side has closed the connection.
    """
    stream.write(pack_header(header, len(content)))
    stream.write(content)
    stream.flush()


def read_frame(stream: BufferedRWPair) -> tuple[dict[str, Any], bytes] | None:
    """Reads a frame; returns None if the other side has closed the connection, also within a frame."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    of_header, of_content = _LENGTHS.unpack(lengths)
    header, content = stream.read(of_header), stream.read(of_content)
    if len(header) < of_header or len(content) < of_content:
        return None
    return json.loads(header), content


async def receive_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """Receives a frame.

    Raises:
        asyncio.IncompleteReadError: the other side has closed the connection.
    """
    of_header, of_content = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    return json.loads(await reader.readexactly(of_header)), await reader.readexactly(of_content)
