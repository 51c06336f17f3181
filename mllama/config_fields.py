"""The kinds of values that the fields of a configuration take, and the check of all of them at once."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mllama.wording import quoted


class ConfigError(ValueError):
    """A configuration that cannot be. `problems` holds one line per fault; the message has them all."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            f"{name}: {problems[0]}"
            if len(problems) == 1
            else f"{name}: {len(problems)} problems:" + "".join(f"\n  - {p}" for p in problems)
        )


@dataclass(frozen=True)
class Kind:
    """What a field takes.

    Attributes:
        words: it in words, after "must be".
        read: the plain value of what was given (a number of numpy becomes Python's); ValueError if it is
            of another kind, with other words where it is one that goes too far.
    """

    words: str
    read: Callable[[Any], Any]


def _check(condition: bool, words: str = "") -> None:
    if not condition:
        raise ValueError(words)


def integer(low: int, high: int | None = None) -> Kind:
    words = f"an integer of at least {low}"

    def read(value: Any) -> int:
        _check(isinstance(value, Integral) and not isinstance(value, bool) and value >= low)
        _check(high is None or value <= high, f"{words} and at most {high}")
        return int(value)

    return Kind(words, read)


def number(low: float, high: float = sys.float_info.max, *, above: bool = False) -> Kind:
    """Finite, at least ``low`` or, with ``above``, more than it; at most ``high``."""
    words = f"a finite number {'above' if above else 'of at least'} {low:g}"

    def read(value: Any) -> float:
        _check(isinstance(value, Real) and not isinstance(value, bool))
        _check(value == value and abs(value) != math.inf)
        _check(value > low if above else value >= low)
        _check(value <= high, f"{words} and at most {high:g}")
        # What torch computes with must fit into 64 bits.
        is_plain = type(value) is float or (type(value) is int and value < 2**53)
        return value if is_plain else float(value)

    return Kind(words, read)


def exactly(type_: type, words: str) -> Kind:
    def read(value: Any) -> Any:
        _check(isinstance(value, type_))
        return value

    return Kind(words, read)


def list_of(
    kind: Kind, words: str, length: int | None = None, most: int | None = None, least: int = 0
) -> Kind:
    """A list, or a tuple, of ``length`` entries where that is given, of at most ``most`` and ``least``."""

    def read(value: Any) -> list[Any]:
        _check(isinstance(value, (list, tuple)) and length in (None, len(value)))
        _check(len(value) >= least)
        _check(most is None or len(value) <= most, f"{words}, at most {most} of them")
        try:
            return [kind.read(entry) for entry in value]
        except ValueError:
            raise ValueError from None  # in the words of the list

    return Kind(words, read)


def named(kind: Kind, words: str) -> Kind:
    """The same kind in other words."""
    return Kind(words, kind.read)


def either(*kinds: Kind) -> Kind:
    def read(value: Any) -> Any:
        too_far = ""
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError as error:
                too_far = too_far or str(error)
        raise ValueError(too_far)

    return Kind(" or ".join(kind.words for kind in kinds), read)


NOTHING = exactly(type(None), "None")
FLAG = exactly(bool, "True or False")
TEXT = exactly(str, "a string")
ENTRIES = exactly(Mapping, "a dictionary")
COUNT = integer(1, 2**53)
TOKEN = integer(0, 2**31 - 1)


def entry(kind: Kind, default: Any) -> Any:
    """A field of a dataclass whose values are checked by :func:`kind_problems`."""
    return dataclasses.field(default=default, metadata={"kind": kind})


def value_problem(name: str, kind: Kind, values: dict[str, Any]) -> list[str]:
    """The fault of ``values[name]``, if any; otherwise it becomes the plain value."""
    try:
        values[name] = kind.read(values[name])
    except ValueError as error:
        return [f"{name} must be {str(error) or kind.words}, got {quoted(values[name])}"]
    return []


def kind_problems(config: Any) -> list[str]:
    """The faults of all fields that say what they take; the other values become plain ones."""
    problems = []
    for field in dataclasses.fields(config):
        if "kind" in field.metadata:
            problems += value_problem(field.name, field.metadata["kind"], vars(config))
    return problems
