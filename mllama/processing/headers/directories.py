"""Directories of tags: those of a TIFF file, and of the Exif data in files of other formats.

A directory may point at the same bytes many times over, and a number of it becomes an object of Python's:
few bytes can ask for gigabytes.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from mllama.processing.headers.budget import Budget

PREFIXES = (b"MM\0\x2a", b"II\x2a\0", b"MM\x2a\0", b"II\0\x2a", b"II\x2b\0")
_LARGE = b"II\x2b\0"  # BigTIFF; Pillow reads it in this byte order
_EXIF, _GPS, _INTEROPERABILITY = 0x8769, 0x8825, 0xA005
_EXIF_NAME = re.compile(b"(?:Exif\0\0){1,2}")
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_PLAIN, _FRACTIONS = (1, 2, 7), (5, 10)
_FORGIVEN = 8  # tags whose data is not there: cameras and editors make mistakes
_NUMBER_OBJECT, _FRACTION_OBJECT = 40, 320  # bytes that Python takes for one


class Entry(NamedTuple):
    """Where the values of a tag stand.

    Attributes:
        kind: the number of their type.
        start: their position in the data.
    """

    kind: int
    count: int
    start: int


class Directories:
    """The tags of a TIFF structure in `data`, read within a budget.

    Attributes:
        tags: of its first directory, each with all entries that claim it.
    """

    def __init__(self, data: bytes, budget: Budget) -> None:
        self._data, self._budget = data, budget
        self._order = "<" if data.startswith(b"II") else ">"
        self._large = data.startswith(_LARGE)
        self._claimed = self._lies = 0
        start = self._unpacked("Q" if self._large else "I", 8 if self._large else 4)
        self.tags = self._directory(start)
        # Pillow reads these as well when it turns an image upright
        exif = self._linked(self.tags, _EXIF)
        self._linked(self.tags, _GPS)
        self._linked(exif, _INTEROPERABILITY)

    def numbers(self, tag: int) -> list[int]:
        """All whole numbers that entries of this tag hold; [] without any."""
        found: list[int] = []
        for kind, count, start in self.tags.get(tag, ()):
            letter = _NUMBERS.get(kind)
            if letter is not None:
                count = min(count, max(len(self._data) - start, 0) // _SIZES[kind])
                found += struct.unpack_from(f"{self._order}{count}{letter}", self._data, start)
        return found

    def _linked(self, tags: dict[int, list[Entry]], tag: int) -> dict[int, list[Entry]]:
        for kind, count, start in tags.get(tag, ()):
            letter = _NUMBERS.get(kind)
            if letter is not None and count == 1:
                return self._directory(self._unpacked(letter, start))
        return {}

    def _directory(self, position: int) -> dict[int, list[Entry]]:
        data, large = self._data, self._large
        form = struct.Struct(self._order + ("HHQ" if large else "HHI"))
        head, inline = (8, 8) if large else (2, 4)
        if position + head > len(data):
            return {}
        count = self._unpacked("Q" if large else "H", position)
        self._budget.segments(count)
        tags: dict[int, list[Entry]] = {}
        for _ in range(count):
            start = position + head
            position += form.size + inline
            if start + form.size + inline > len(data):
                break
            tag, kind, values = form.unpack_from(data, start)
            size = _SIZES.get(kind)
            if size is None:
                continue
            self._budget.metadata(_cost(kind, values, size))
            start += form.size
            if values * size > inline:
                start = self._unpacked("Q" if large else "I", start)
                self._claim(start, values * size)
            tags.setdefault(tag, []).append(Entry(kind, values, start))
        return tags

    def _claim(self, start: int, size: int) -> None:
        """Refuse data of which many tags lie: Pillow writes a warning for each."""
        self._claimed += size
        if start + size > len(self._data) or self._claimed > len(self._data):
            self._lies += 1
            if self._lies > _FORGIVEN:
                raise self._budget.damaged("its tags claim more than the file holds")

    def _unpacked(self, letter: str, position: int) -> int:
        if position + struct.calcsize("=" + letter) > len(self._data):
            return 0
        return struct.unpack_from(self._order + letter, self._data, position)[0]


def walk_exif(data: bytes, budget: Budget) -> None:
    """Check Exif data before Pillow reads it. What is none of it is left to Pillow."""
    name = _EXIF_NAME.match(data)
    body = data[name.end() :] if name else data
    if body.startswith(PREFIXES):
        Directories(body, budget)


def _cost(kind: int, count: int, size: int) -> int:
    if kind in _PLAIN:
        return count * size
    return count * (size + (_FRACTION_OBJECT if kind in _FRACTIONS else _NUMBER_OBJECT))
