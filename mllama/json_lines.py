"""Lines of a file, which end only at line feeds: what JSON Lines are.

Python's `splitlines` also cuts at characters that may stand within a JSON string, as U+2028 does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from mllama.files import open_regular

_SKIPPED_AT_ONCE = 2**20  # bytes


def read_lines(path: str | os.PathLike, max_bytes: int) -> Iterator[bytes | None]:
    """The lines of a regular file with their line feeds, one after the other; a byte-order mark is left out.

    A line of more than ``max_bytes`` is skipped and None is given for it.

    Raises: FileRefused as `open_regular`; OSError where reading fails.
    """
    with open_regular(path) as file:
        yield from lines_of(file, max_bytes)


def lines_of(file: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """As :func:`read_lines`, of a file that is open at its beginning."""
    first = True
    while line := file.readline(max_bytes + 2):
        is_whole = line.endswith(b"\n")
        if len(line) > max_bytes + is_whole:
            if not is_whole:
                _skip(file)
            yield None
        else:
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False


def _skip(file: BinaryIO) -> None:
    """To the end of the line."""
    while (piece := file.readline(_SKIPPED_AT_ONCE)) and not piece.endswith(b"\n"):
        pass
