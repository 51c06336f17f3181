"""WebP: its canvas, and the chunks of all frames, of which the first is read."""

from __future__ import annotations

import struct

from mllama.processing.headers.budget import Budget
from mllama.processing.headers.directories import walk_exif

_FRAME_HEADER = 16  # bytes before a frame's own chunks
_METADATA = (b"ICCP", b"EXIF", b"XMP ")
_COPIES = 16  # bytes a pixel: two canvases, a string of the pixels and the image
_COPIES_MEANWHILE = 9  # while a lossless one is decoded
_LOSSLESS = (b"VP8L", b"ALPH")
_TABLE, _MOST_TABLES = 5888, 2**16  # bytes of the tables of a group of codes; how many groups
_TABLE_PIXELS, _TABLE_BITS = 16, 20  # of an image for each group, and of the file


def matches(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def walk(data: bytes, budget: Budget) -> None:
    """Check every size that the file announces; a frame's chunks stand after its header."""
    position, area = 12, 0
    while position + 8 <= len(data):
        budget.segments()
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8
        size = _announced(kind, data[position : position + _FRAME_HEADER])
        if size is not None:
            budget.size(*size)
            area = max(area, size[0] * size[1])
            budget.decoded(_COPIES * area)
        if kind in _LOSSLESS:
            budget.decoded(_COPIES_MEANWHILE * area + lossless_tables(area, length))
        elif kind in _METADATA:
            budget.metadata(min(length, len(data)))
            if kind == b"EXIF":
                walk_exif(data[position : position + length], budget)
        position += _FRAME_HEADER if kind == b"ANMF" else length + (length & 1)


def lossless_tables(area: int, length: int) -> int:
    """Bytes that the code tables of a lossless image may take.

    How many there are stands inside the stream: this is the most that a file of its length can ask for.
    Encoders use a few thousand at most.
    """
    return _TABLE * min(_MOST_TABLES, -(-area // _TABLE_PIXELS), 8 * length // _TABLE_BITS)


def _announced(kind: bytes, body: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X" and len(body) >= 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"ANMF" and len(body) >= 12:
        return int.from_bytes(body[6:9], "little") + 1, int.from_bytes(body[9:12], "little") + 1
    if kind == b"VP8 " and len(body) >= 10:
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(body) >= 5:
        packed = int.from_bytes(body[1:5], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    return None
