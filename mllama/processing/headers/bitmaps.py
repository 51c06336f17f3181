"""BMP, and ICO, whose images are bitmaps without their file header, or PNG."""

from __future__ import annotations

import struct

from mllama.processing.headers import png
from mllama.processing.headers.budget import Budget

BITMAP, ICON = b"BM", b"\0\0\1\0"
_RUN_LENGTHS = (1, 2)  # compressions that Pillow decodes in Python
_OLD_HEADER = 12  # length of the first kind of header
_ICON_COPIES = 18  # bytes a pixel: file, RGB, RGBA, mask and what they become


def walk_bitmap(data: bytes, budget: Budget) -> None:
    """Check the one image of a BMP."""
    width, height = _dimensions(data, 14, budget)
    budget.size(width, height)
    bits, compression = _depth(data, 14)
    pixel = 1 if bits <= 8 else 4
    # run lengths become a string of their pixels, and a copy of it
    budget.decoded((pixel + 4 + (3 if compression in _RUN_LENGTHS else 0)) * width * height)
    _check_runs(compression, width * height, len(data), budget)


def walk_icon(data: bytes, budget: Budget) -> None:
    """Check those images of an icon that Pillow may decode, which it does when it opens the file.

    It takes the largest by its directory, whatever size that image then has. Which of several with the
    same size depends on its version.
    """
    entries = min(int.from_bytes(data[4:6], "little"), (len(data) - 6) // 16)
    budget.segments(entries)
    starts: dict[int, set[int]] = {}
    for position in range(6, 6 + 16 * entries, 16):
        announced = (data[position] or 256) * (data[position + 1] or 256)
        starts.setdefault(announced, set()).add(
            int.from_bytes(data[position + 12 : position + 16], "little")
        )
    for start in sorted(starts[max(starts)]) if starts else ():
        if data.startswith(png.SIGNATURE, start):
            png.walk(data, budget, start)
            continue
        budget.segments()
        width, height = _dimensions(data, start, budget)
        height = max(height // 2, 1)  # the mask stands below the image
        budget.size(width, height)
        budget.decoded(_ICON_COPIES * width * height)
        _, compression = _depth(data, start)
        _check_runs(compression, width * height, len(data), budget)


def _dimensions(data: bytes, start: int, budget: Budget) -> tuple[int, int]:
    if start + 16 > len(data):
        raise budget.damaged("it is cut off")
    if _header_length(data, start) == _OLD_HEADER:
        return struct.unpack_from("<HH", data, start + 4)
    width, height = struct.unpack_from("<Ii", data, start + 4)
    return width, abs(height)


def _depth(data: bytes, start: int) -> tuple[int, int]:
    """Bits of a pixel, and the compression."""
    if _header_length(data, start) == _OLD_HEADER:
        return int.from_bytes(data[start + 10 : start + 12], "little"), 0
    bits = int.from_bytes(data[start + 14 : start + 16], "little")
    return bits, int.from_bytes(data[start + 16 : start + 20], "little")


def _header_length(data: bytes, start: int) -> int:
    return int.from_bytes(data[start : start + 4], "little")


def _check_runs(compression: int, pixels: int, length: int, budget: Budget) -> None:
    if compression in _RUN_LENGTHS:
        budget.spend("max_slow_values", pixels + length)
