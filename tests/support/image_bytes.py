"""Image files that Pillow cannot write, byte by byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping


def png(width: int, height: int, bits: int, colours: int, rows: bytes, chunks: Mapping[bytes, bytes] | None = None):
    """Returns a PNG file.

    Args:
        width: in pixels.
        height: in pixels.
        bits: of a channel.
        colours: the colour type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
        rows: the packed pixels of all rows; b"" for a file without any.
        chunks: the chunks between the header and the pixels, by name.
    """
    size = len(rows) // height
    lines = b"".join(b"\0" + rows[i * size : (i + 1) * size] for i in range(height)) if rows else b""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = {b"IHDR": header, **(chunks or {}), b"IDAT": zlib.compress(lines), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


def tiff(width: int, height: int, bits: int, photometric: int, pixels: bytes, sample_format: int = 1) -> bytes:
    """Returns an uncompressed little-endian TIFF file of one channel.

    Args:
        width: in pixels.
        height: in pixels.
        bits: of a pixel.
        photometric: 0 if the value 0 is white, 1 if it is black.
        pixels: the packed pixels.
        sample_format: 1 for unsigned integers, 2 for signed ones, 3 for floating-point values.
    """
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 279: len(pixels)}
    tags |= {273: 8 + 2 + 12 * (len(tags) + 2) + 4, 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels
