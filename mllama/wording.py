"""How errors repeat what they were given: short whatever its size, on one line, harmless in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

_LONGEST, _BEGINNING = 240, 60  # characters
_LONGEST_VALUE, _ENTRIES, _DEPTH = 160, 6, 3
_LONGEST_INTEGER = 256  # bits
_LONGEST_LINE, _MOST_LINES = 4000, 600  # a checkpoint whose every tensor is wrong has 500 lines


def shown(text: str, most: int = _LONGEST) -> str:
    """A name or a reason: itself, or its beginning and length where it has more than ``most`` characters.

    Control characters, which could move a terminal's cursor, and halves of surrogate pairs are escaped.
    """
    if len(text) > most:
        return f"{text[:_BEGINNING]!r}... ({len(text)} characters)"
    return text if text.isprintable() else "".join(map(_escaped, text))


def message(text: str) -> str:
    """A message of one or more lines, whose names are short already, for a terminal.

    Control characters are escaped, and what is far longer than any message of this package is cut at its end.
    """
    lines = text.split("\n")
    kept = ["".join(map(_escaped, line[:_LONGEST_LINE])) for line in lines[:_MOST_LINES]]
    kept = [
        f"{k}... ({len(x)} characters)" if len(x) > _LONGEST_LINE else k
        for k, x in zip(kept, lines)
    ]
    more = [f"... {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
    return "\n".join([*kept, *more])


def size(nbytes: int) -> str:
    """Bytes of memory, for a person."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def quoted(value: Any) -> str:
    """A value as Python writes it, or as much of it as an error needs."""
    text = _written(value, _DEPTH)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names with commas between them; those beyond ``most`` are counted."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def reason(error: BaseException) -> str:
    """What another library says is wrong, or the beginning of it."""
    text = str(error)[: 2 * _LONGEST]
    words = "".join(map(_escaped, " ".join(text.split())))
    return f"{words[:_LONGEST]}..." if len(words) > _LONGEST else words or type(error).__name__


def _escaped(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def _written(value: Any, depth: int) -> str:
    if isinstance(value, str):
        short = repr(value[:_BEGINNING])
        return short if len(value) <= _BEGINNING else f"{short}... ({len(value)} characters)"
    if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:  # repr() refuses some
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    kind = type(value)
    if kind in (dict, list, tuple, set, frozenset):
        return _written_entries(value, depth)
    try:
        text = repr(value)
    except Exception:  # an object's own, which may do anything
        return f"a {kind.__name__}"
    return shown(re.sub(r"\s+", " ", text))


def _written_entries(value: Any, depth: int) -> str:
    kind = type(value)
    if not value:
        return repr(value)
    if depth == 0:
        return f"a {kind.__name__} of {len(value)}"
    if isinstance(value, Mapping):
        entries = islice(value.items(), _ENTRIES)
        parts = [f"{_written(k, depth - 1)}: {_written(v, depth - 1)}" for k, v in entries]
    else:
        parts = [_written(entry, depth - 1) for entry in islice(value, _ENTRIES)]
    if len(value) > _ENTRIES:
        parts.append(f"... ({len(value)} in all)")
    opening, closing = {list: "[]", dict: "{}", tuple: "()"}.get(kind, "{}")
    comma = "," if kind is tuple and len(value) == 1 else ""
    body = opening + ", ".join(parts) + comma + closing
    return f"frozenset({body})" if kind is frozenset else body
