"""GIF: what stands before the first image, which is the only one that is read."""

from __future__ import annotations

import struct

from mllama.processing.headers.budget import Budget

SIGNATURES = (b"GIF87a", b"GIF89a")
_EXTENSION, _IMAGE = 0x21, 0x2C
_COPIES = 6  # bytes a pixel: palette numbers, those of the background, and RGB


def walk(data: bytes, budget: Budget) -> None:
    """Follow the extensions to the first image and check the canvas that both need."""
    if len(data) < 13:
        return
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while position < len(data):
        kind = data[position]
        position += 1
        budget.segments()
        if kind == _EXTENSION:
            position = _after_blocks(data, position + 1, budget)
        elif kind == _IMAGE and position + 8 <= len(data):
            left, top, across, down = struct.unpack_from("<4H", data, position)
            width, height = max(width, left + across), max(height, top + down)
            break
    budget.size(width, height)
    budget.decoded(_COPIES * width * height)


def _after_blocks(data: bytes, position: int, budget: Budget) -> int:
    while position < len(data) and (length := data[position]):
        budget.segments()
        budget.metadata(length)
        position += length + 1
    return position + 1
