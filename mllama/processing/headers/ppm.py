"""PPM and its kin: a line of text, and numbers of which some kinds are decoded one by one in Python."""

from __future__ import annotations

import re

from mllama.processing.headers.budget import Budget

MAGIC = re.compile(rb"P[1-6f]\s")
_BLANK = rb"(?:\s|#[^\r\n]*[\r\n])+"
_HEADER = re.compile(
    rb"P([1-6f])"
    + _BLANK
    + rb"(\d{1,10})"
    + _BLANK
    + rb"(\d{1,10})(?:"
    + _BLANK
    + rb"(\S{1,10}))?\s"
)
_LONGEST_HEADER = 1024  # bytes; Pillow reads comments byte by byte
_COMMENT = 400  # bytes that are decoded in the time of one: it copies the block it stands in
_FLOAT = b"f"


def walk(data: bytes, budget: Budget) -> None:
    """Check the sizes, and the length of text and of numbers with an unusual maximum."""
    header = _HEADER.match(data[:_LONGEST_HEADER])
    if header is None:
        raise budget.damaged(f"no sizes in {_LONGEST_HEADER} bytes of PPM")
    kind, width, height, largest = header[1], int(header[2]), int(header[3]), header[4]
    budget.size(width, height)
    area = width * height
    if kind in b"123":
        budget.spend("max_slow_values", len(data))
        budget.spend("max_slow_values", _COMMENT * data.count(b"#"))
        one_by_one = True
    else:
        usual = {b"4": (largest,), b"5": (b"255", b"65535"), b"6": (b"255",), _FLOAT: (largest,)}
        one_by_one = largest not in usual[kind]
        if one_by_one:
            budget.spend("max_slow_values", min(len(data), area * (3 if kind == b"6" else 1)))
    deep = 4 if kind == b"2" or largest == b"65535" or (one_by_one and kind == b"5") else 1
    pixel = {b"1": 1, b"4": 1, b"2": deep, b"5": deep}.get(kind, 4)
    budget.decoded(area * (pixel + 4 + (3 * pixel if one_by_one else 0)))
