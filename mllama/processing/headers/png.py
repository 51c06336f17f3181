"""PNG: all its chunks, also those that stand after the pixels and are read with them."""

from __future__ import annotations

import struct

from mllama.processing.headers.budget import Budget
from mllama.processing.headers.directories import walk_exif

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INFLATED = 2**20  # bytes to which Pillow expands one chunk at most; it refuses more
_RATIO = 1032  # of zlib at its best
_COMPRESSED = (b"iCCP", b"zTXt", b"iTXt")
_COPIES = 8  # bytes a pixel: four of RGBA, and as many of what it is turned or converted to
_DEEP_COPIES = 12  # of a grey image of 16 bits: arrays, too


def walk(data: bytes, budget: Budget, start: int = 0) -> None:
    """Follow the chunks to the end. A cut or lying chunk ends the walk; the decoder finds it too."""
    position = start + len(SIGNATURE)
    while position + 8 <= len(data):
        budget.segments()
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IHDR" and position + 16 <= len(data):
            # Each of them counts, for the decoder takes the last.
            width, height = struct.unpack_from(">II", data, position + 8)
            budget.size(width, height)
            deep = data[position + 16 : position + 18] == b"\x10\0"
            budget.decoded((_DEEP_COPIES if deep else _COPIES) * width * height)
        elif kind in _COMPRESSED:
            budget.metadata(min(length * _RATIO, _INFLATED))
        elif kind not in (b"IDAT", b"fdAT", b"IEND"):
            budget.metadata(min(length, len(data)))
            if kind == b"eXIf":
                walk_exif(data[position + 8 : position + 8 + length], budget)
        if kind == b"IEND":
            return
        position += length + 12
