"""JSON of which nothing is guessed: a key is given once, strings are text, and errors hold none of it."""

from __future__ import annotations

import json
import re
from typing import Any

_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, *, constants: bool = False) -> Any:
    """The value that a JSON text stands for.

    Args:
        constants: take NaN, Infinity and -Infinity too, which are no JSON but which Python writes.
    Raises: ValueError with the reason and, where there is one, the position; never with what is there. A key
        that is there twice, half of a surrogate pair, and nesting beyond Python's recursion are refused.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=float if constants else _no_constant,
        )
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except _Refused:
        raise
    except ValueError:  # of int(), which bounds the digits
        raise ValueError("a number has too many digits") from None
    if _HALF_OF_A_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a string has half of a surrogate pair, which is no text") from None
    return value


class _Refused(ValueError):
    """What Python's parser would have let pass."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _Refused("an object has the same key twice")
    return entries


def _no_constant(name: str) -> float:
    raise _Refused(f"{name} is no number in JSON")
