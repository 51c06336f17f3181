"""AVIF: the images of a file's items and tracks, by the sizes that their own streams announce.

The container's sizes would not do: a stream may hold a larger image, many hidden frames, and a grid
may have thousands of such streams.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from mllama.processing.headers.budget import Budget
from mllama.processing.headers.directories import walk_exif

_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
_FOLDERS = {
    b"moov": 0,
    b"trak": 0,
    b"mdia": 0,
    b"minf": 0,
    b"stbl": 0,
    b"meta": 4,
    b"iprp": 0,
    b"ipco": 0,
}
_COUNTED = (b"ipma", b"stts", b"stss", b"ctts", b"iinf")  # lists of which only the length matters
_STREAM, _METADATA = b"av01", (b"Exif", b"mime")
_SEQUENCE, _FRAMES = 1, (3, 6, 7)
_REFERENCES = 9  # frames that a decoder keeps at most
# A pixel of AV1 takes as long as so many samples of a JPEG's scan, and so does a byte of its stream.
_PIXEL_EFFORT, _BYTE_EFFORT = 10, 150
_COPIES = 10  # bytes a pixel: RGBA of the library, a string of it and the image
_DEPTHS = (3, 6, 6)  # bytes a pixel of a frame, by the stream's profile

_Pieces = list[tuple[int, int]]  # (start, length)


def matches(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def walk(data: bytes, budget: Budget) -> None:
    """Check every image that the file holds."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    for kind, start, end in _boxes(data, 0, len(data), budget):
        found.setdefault(kind, []).append((start, end))
        if kind in _COUNTED and start + 8 <= end:
            wide = kind != b"iinf" or data[start] > 0
            budget.segments(_number(data, start + 4, 4 if wide else 2))
    canvas = 0
    for start, _ in found.get(b"ispe", ()):
        width, height = _number(data, start + 4, 4), _number(data, start + 8, 4)
        budget.size(width, height)
        canvas = max(canvas, width * height)
    kinds = dict(_items(data, found))
    left, frames = len(data), 0
    for item, pieces in (*_places(data, found, budget), *_first_samples(data, found, budget)):
        left -= sum(length for _, length in pieces)
        if left < 0:
            raise budget.damaged("it holds less than its items, or they overlap")
        body = b"".join(data[start : start + length] for start, length in pieces)
        kind = kinds.get(item, _STREAM)
        if kind in _METADATA:
            budget.metadata(len(body))
        if kind == b"Exif":
            walk_exif(body[4 + _number(body, 0, 4) :], budget)
        elif kind == b"grid":
            canvas = max(canvas, _grid(body, budget))
        elif kind == _STREAM:
            area, memory = _stream(body, budget)
            canvas, frames = max(canvas, area), frames + memory
    budget.decoded(_COPIES * canvas + frames)


def _boxes(data: bytes, start: int, end: int, budget: Budget) -> Iterator[tuple[bytes, int, int]]:
    """The kind of every box and where its contents start and end; those of folders follow theirs."""
    pending = [(start, end)]
    while pending:
        start, end = pending.pop()
        while start + 8 <= end:
            budget.segments()
            size, kind = struct.unpack_from(">I4s", data, start)
            head = 8
            if size == 1:
                size, head = _number(data, start + 8, 8), 16
            stop = min(start + size, end) if size else end
            if stop < start + head:
                return
            yield kind, start + head, stop
            if kind in _FOLDERS:
                pending.append((start + head + _FOLDERS[kind], stop))
            start = stop


def _items(data: bytes, found: dict[bytes, list[tuple[int, int]]]) -> Iterator[tuple[int, bytes]]:
    """Identifier and type of every item."""
    for start, end in found.get(b"iinf", ()):
        position = start + (8 if data[start : start + 1] > b"\0" else 6)
        while position + 20 <= end:
            size, _, version = struct.unpack_from(">I4sB", data, position)
            width = 4 if version > 2 else 2
            item = _number(data, position + 12, width)
            yield item, data[position + 14 + width : position + 18 + width]
            position += max(size, 8)


def _places(
    data: bytes, found: dict[bytes, list[tuple[int, int]]], budget: Budget
) -> Iterator[tuple[int | None, _Pieces]]:
    """Identifier of every item, and the pieces that its contents are in."""
    own = found.get(b"idat", [(0, 0)])[0][0]
    for start, end in found.get(b"iloc", ()):
        version, sizes = data[start], _number(data, start + 4, 2)
        offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
        index_size = sizes & 15 if version in (1, 2) else 0
        wide = 4 if version == 2 else 2
        count, position = _number(data, start + 6, wide), start + 6 + wide
        budget.segments(count)
        for _ in range(count):
            if position >= end:
                break
            item = _number(data, position, wide)
            position += wide
            method = 0
            if version in (1, 2):
                method = data[position + 1] & 15 if position + 1 < end else 0
                position += 2
            base = _number(data, position + 2, base_size)
            extents = _number(data, position + 2 + base_size, 2)
            position += 4 + base_size
            budget.segments(extents)
            pieces = []
            for _ in range(extents):
                position += index_size
                at = base + _number(data, position, offset_size) + (own if method == 1 else 0)
                length = _number(data, position + offset_size, length_size)
                position += offset_size + length_size
                pieces.append((at, length))
            yield item, pieces


def _first_samples(
    data: bytes, found: dict[bytes, list[tuple[int, int]]], budget: Budget
) -> Iterator[tuple[int | None, _Pieces]]:
    """Where the first image of every track stands; the lengths of all lists are spent."""
    chunks, firsts = 0, []
    for kind, width in ((b"stco", 4), (b"co64", 8)):
        for start, _ in found.get(kind, ()):
            chunks = max(chunks, _number(data, start + 4, 4))
            firsts.append(_number(data, start + 8, width))
    for start, end in found.get(b"stsc", ()):
        runs = min(_number(data, start + 4, 4), (end - start) // 12)
        most = max((_number(data, start + 12 + 12 * i, 4) for i in range(runs)), default=1)
        budget.segments(runs + chunks * most)
    for (start, _), first in zip(found.get(b"stsz", ()), firsts):
        budget.segments(_number(data, start + 8, 4))
        yield None, [(first, _number(data, start + 4, 4) or _number(data, start + 12, 4))]


def _grid(body: bytes, budget: Budget) -> int:
    """The area of the image that a grid's cells make up."""
    wide = 4 if body[1:2] and body[1] & 1 else 2
    width, height = _number(body, 4, wide), _number(body, 4 + wide, wide)
    budget.size(width, height)
    return width * height


def _stream(data: bytes, budget: Budget) -> tuple[int, int]:
    """The area of an AV1 stream's largest image, and the bytes of the frames that are kept."""
    budget.spend("max_scanned_samples", _BYTE_EFFORT * len(data))
    position, area, depth, frames = 0, 0, 0, 0
    while position < len(data):
        kind, extended, sized = (
            data[position] >> 3 & 15,
            data[position] >> 2 & 1,
            data[position] >> 1 & 1,
        )
        position += 1 + extended
        length = len(data) - position
        if sized:
            length, position = _leb128(data, position)
        budget.segments()
        if kind == _SEQUENCE:
            profile, width, height = _sequence(data[position : position + length])
            budget.size(width, height)
            area, depth = max(area, width * height), max(depth, _DEPTHS[min(profile, 2)])
        elif kind in _FRAMES:
            frames += 1
            budget.spend("max_scanned_samples", _PIXEL_EFFORT * area)
        position += length
    return area, area * depth * min(frames, _REFERENCES)


def _sequence(body: bytes) -> tuple[int, int, int]:
    """Profile, width and height of a sequence header, as AV1's specification lays it out (5.5)."""
    bits = _Bits(body)
    profile, _, reduced = bits(3), bits(1), bits(1)
    if reduced:
        bits(5)
    else:
        delays = 0
        if bits(1):  # timing
            bits(64)
            if bits(1):
                zeros = 0
                while zeros < 32 and not bits.ended and not bits(1):
                    zeros += 1
                bits(zeros)
            if bits(1):  # decoder model
                delays = bits(5) + 1
                bits(42)
        display = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delays and bits(1):
                bits(2 * delays + 1)
            if display and bits(1):
                bits(4)
    wide, high = bits(4) + 1, bits(4) + 1
    return profile, bits(wide) + 1, bits(high) + 1


class _Bits:
    """Reads numbers of any count of bits, the highest first; zeros after the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data[:256], "big"), 8 * min(len(data), 256)

    def __call__(self, count: int) -> int:
        self._left -= count
        moved = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return moved & (1 << count) - 1

    @property
    def ended(self) -> bool:
        return self._left <= 0


def _leb128(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[position] if position < len(data) else 0
        position += 1
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            break
    return value, position


def _number(data: bytes, position: int, width: int) -> int:
    return int.from_bytes(data[position : position + width], "big")
