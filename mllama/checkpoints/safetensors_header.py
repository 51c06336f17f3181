"""The header of a safetensors file, checked as a whole before anything relies on a number in it.

A header names every tensor of its file: what is allocated and mapped later follows from it alone. It is read
with bounds far above what real checkpoints have, and must describe the bytes after it without gaps, overlaps
or a byte more or less.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama.files import FileRefused, open_regular
from mllama.strict_json import parse_json
from mllama.wording import quoted, shown

# The 90B model has 1,700 tensors in 37 files, and headers of 10 kB.
MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 50_000
MAX_NAME = 512  # characters
_MAX_DIMENSIONS = 16
_MAX_METADATA = 10_000  # entries
_LARGEST = 2**63 - 1  # what a size or an offset of the library's can be
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class BadHeader(ValueError):
    """The header cannot be used; the text says why and names the file."""


@dataclass(frozen=True)
class Header:
    """What a header announces.

    Attributes:
        tensors: name to the stored type and the shape.
        size: of the whole file in bytes.
        problem: why the data cannot be trusted although the header can be read, or None.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    size: int
    problem: str | None


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises: BadHeader for a file that is missing, no regular one, or whose header cannot be used.
    """
    name = shown(path.name)
    if not os.path.lexists(path):
        raise BadHeader(f"{name} is missing")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadHeader(
                    f"{name} is truncated or not a safetensors file: its {size:,} bytes do not hold the "
                    "header that they announce"
                )
            if length > MAX_HEADER_BYTES:
                raise BadHeader(
                    f"{name} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
                )
            text = file.read(length)
    except FileRefused as error:
        raise BadHeader(f"{name} cannot be read: {error}") from None
    except OSError as error:
        raise BadHeader(f"{name} cannot be read: {error.strerror}") from None
    if len(text) != length:
        raise BadHeader(f"{name} is truncated: it was cut while it was read")
    try:
        entries = parse_json(text.decode("utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
        _check_metadata(entries.pop("__metadata__", {}))
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"{len(entries):,} tensors; at most {MAX_TENSORS:,} are read")
        spans = [_span(key, entry) for key, entry in entries.items()]
    except UnicodeDecodeError as error:
        reason = f"it is no UTF-8 text at byte {error.start}"
        raise BadHeader(f"{name} has a damaged safetensors header: {reason}") from None
    except ValueError as error:
        raise BadHeader(f"{name} has a damaged safetensors header: {error}") from None
    tensors = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}
    problem = _problem(8 + length, spans, size)
    return Header(tensors, size, None if problem is None else f"{name} is {problem}")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must hold strings by name")
    if len(metadata) > _MAX_METADATA:
        raise ValueError(f"__metadata__ has {len(metadata):,} entries, at most {_MAX_METADATA:,}")


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's data begins and ends after the header, and its name."""
    if len(name) > MAX_NAME:
        raise ValueError(f"a tensor's name has {len(name):,} characters, at most {MAX_NAME}")
    wrong = f"the entry of {shown(name)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"{wrong} has no dtype")
    for part in ("shape", "data_offsets"):
        numbers = entry.get(part)
        # A bool is an int to Python, and no size.
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n <= _LARGEST for n in numbers
        ):
            raise ValueError(f"{wrong} needs {part}, a list of sizes, got {quoted(numbers)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{wrong} needs data_offsets, a begin and an end, got {quoted(offsets)}")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{wrong} has {len(shape):,} dimensions, at most {_MAX_DIMENSIONS}")
    # Before torch multiplies: a size of 0 would let any others pass.
    if math.prod(max(n, 1) for n in shape) > _LARGEST:
        raise ValueError(f"{wrong} has a shape beyond 2^63, {quoted(shape)}")
    bits = _BITS.get(entry["dtype"])
    if bits is not None and math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{wrong} announces {offsets[1] - offsets[0]:,} bytes, which are not those of its shape "
            f"{quoted(shape)} in {entry['dtype']}"
        )
    return offsets[0], offsets[1], name


def _problem(start: int, spans: list[tuple[int, int, str]], size: int) -> str | None:
    """Why the bytes after the header are not those that it announces, or None."""
    end = 0
    for begins, ends, name in sorted(spans):
        if begins != end:
            kind = "a gap before" if begins > end else "an overlap at"
            return f"damaged: its data has {kind} {shown(name)}"
        end = ends
    if size != start + end:
        kind = "truncated" if size < start + end else "damaged (bytes after the last tensor)"
        return f"{kind}: {size:,} bytes, its header announces {start + end:,}"
    return None
