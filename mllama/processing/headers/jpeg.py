"""JPEG: segments, frame and scans, also those between and after the pixels of others.

A progressive image is a pass over all its coefficients for every scan, and a scan may be a few bytes: what
bounds the time is their product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mllama.processing.headers.budget import Budget
from mllama.processing.headers.directories import walk_exif

SIGNATURE = b"\xff\xd8\xff"
_FRAMES = frozenset(
    (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
)
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_SCAN, _END, _METADATA = 0xDA, 0xD9, 0xE0
_EXIF = b"Exif\0\0"
_FURTHER = b"MPF\0"  # the directory of other images in the file, all of which Pillow reads
_BARE = frozenset((*range(0xC0), 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))  # without a length
_LOSSLESS = 0xC3
_FIRST_BLOCK, _LAST_BLOCK = 64, 2**20  # bytes that are searched at once
_MARKERS = np.ones(256, dtype=bool)
_MARKERS[[0x00, 0xFF, *range(0xD0, 0xD8)]] = False  # stuffing, padding and restarts


class Frame(NamedTuple):
    """What an image's frame header says.

    Attributes:
        bands: its components.
        samples: those that each component stores, by its identifier.
        buffered: bytes of the coefficients, which are kept where there is more than one scan.
    """

    width: int
    height: int
    bands: int
    samples: dict[int, int]
    buffered: int


def walk(data: bytes, budget: Budget) -> None:
    """Check what the whole file asks for, and its Exif data."""
    exif, joined = [], 0
    for found in scanned(data, budget):
        if isinstance(found, Frame):
            area, pixel = found.width * found.height, 1 if found.bands == 1 else 4
            budget.size(found.width, found.height)
            budget.decoded(max(pixel * area + found.buffered, (pixel + 4) * area))
            continue
        budget.metadata(len(found))
        budget.segments(found.count(b"8BIM"))  # Photoshop's resources, which Pillow lists
        if found.startswith(_FURTHER):
            walk_exif(found[len(_FURTHER) :], budget)
        elif found.startswith(_EXIF):
            budget.metadata(joined)  # Pillow joins them by copying
            joined += len(found)
            exif.append(found[len(_EXIF) :])
    walk_exif(b"".join(exif), budget)


def scanned(data: bytes, budget: Budget) -> Iterator[Frame | bytes]:
    """Go through a JPEG and spend what its segments and scans take.

    Yields: every frame as it is announced, and with its buffers when it turns out to need them; the
        contents of every segment of metadata.
    """
    position, frame, kept, scans = len(SIGNATURE) - 1, None, 0, 0
    while (found := _marker(data, position)) >= 0:
        # Pillow goes byte by byte through what stands between the segments before the first scan.
        budget.segments(1 if scans else 1 + found - position)
        marker, position = data[found + 1], found + 2
        if marker == _END and scans:
            return
        if marker in _BARE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + length]
        position += max(length, 2)
        if marker in _FRAMES and len(body) >= 6:
            frame = _frame(body, marker)
            kept = frame.buffered if marker in _PROGRESSIVE else 0
            yield frame._replace(buffered=kept)
        elif marker == _SCAN:
            scans += 1
            budget.spend("max_scans", 1)
            named = body[1 : 1 + 2 * body[0] : 2] if body else b""
            if frame is not None:
                passed = sum(frame.samples.get(component, 0) for component in named)
                budget.spend("max_scanned_samples", passed)
                if len(named) < frame.bands and not kept:
                    kept = frame.buffered
                    yield frame._replace(buffered=kept)
        elif marker >= _METADATA:
            yield body


def _marker(data: bytes, position: int) -> int:
    """Where the next marker starts that is neither stuffing nor a restart; -1 at the end.

    In blocks of an array, small ones first: a search that stops at every 0xff would take long on a file
    full of them, and so would looking at a large block for every marker.
    """
    if data[position : position + 1] == b"\xff" and position + 1 < len(data):
        if _MARKERS[data[position + 1]]:  # as it is after every segment
            return position
    size = _FIRST_BLOCK
    while position < len(data) - 1:
        block = np.frombuffer(data, np.uint8, min(size + 1, len(data) - position), position)
        found = np.flatnonzero((block[:-1] == 0xFF) & _MARKERS[block[1:]])
        if len(found):
            return position + int(found[0])
        position, size = position + size, min(4 * size, _LAST_BLOCK)
    return -1


def _frame(body: bytes, marker: int) -> Frame:
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    components = [body[i : i + 3] for i in range(6, len(body) - 2, 3)][: body[5]]
    across = [max(c[1] >> 4, 1) for c in components]
    down = [max(c[1] & 15, 1) for c in components]
    samples: dict[int, int] = {}
    total = 0
    for (identifier, *_), h, v in zip(components, across, down):
        # whole units of all components are stored, however little of them is seen
        stored = -(-width // (8 * max(across))) * 8 * h * -(-height // (8 * max(down))) * 8 * v
        samples[identifier] = max(samples.get(identifier, 0), stored)
        total += stored
    return Frame(width, height, len(components), samples, (4 if marker == _LOSSLESS else 2) * total)
