"""The kinds of values that the fields of a configuration take, and the check of all of them at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


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
            of another kind.
    """

    words: str
    read: Callable[[Any], Any]


def _check(condition: bool) -> None:
    if not condition:
        raise ValueError


def integer(low: int) -> Kind:
    def read(value: Any) -> int:
        _check(isinstance(value, Integral) and not isinstance(value, bool) and value >= low)
        return int(value)

    return Kind(f"an integer of at least {low}", read)


def number(low: float, *, above: bool = False) -> Kind:
    """Finite, at least ``low`` or, with ``above``, more than it."""

    def read(value: Any) -> float:
        _check(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value))
        _check(value > low if above else value >= low)
        return value if type(value) in (int, float) else float(value)

    return Kind(f"a finite number {'above' if above else 'of at least'} {low:g}", read)


def exactly(type_: type, words: str) -> Kind:
    def read(value: Any) -> Any:
        _check(isinstance(value, type_))
        return value

    return Kind(words, read)


def list_of(kind: Kind, words: str, length: int | None = None) -> Kind:
    def read(value: Any) -> list[Any]:
        _check(isinstance(value, (list, tuple)) and length in (None, len(value)))
        return [kind.read(entry) for entry in value]

    return Kind(words, read)


def either(*kinds: Kind) -> Kind:
    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError:
                continue
        raise ValueError

    return Kind(" or ".join(kind.words for kind in kinds), read)


NOTHING = exactly(type(None), "None")
FLAG = exactly(bool, "True or False")
TEXT = exactly(str, "a string")
ENTRIES = exactly(Mapping, "a dictionary")
COUNT = integer(1)
TOKEN = integer(0)


def entry(kind: Kind, default: Any) -> Any:
    """A field of a dataclass whose values are checked by :func:`kind_problems`."""
    return dataclasses.field(default=default, metadata={"kind": kind})


def value_problem(name: str, kind: Kind, values: dict[str, Any]) -> list[str]:
    """The fault of ``values[name]``, if any; otherwise it becomes the plain value."""
    try:
        values[name] = kind.read(values[name])
    except ValueError:
        given = repr(values[name])
        shown = given if len(given) <= 80 else given[:77] + "..."
        return [f"{name} must be {kind.words}, got {shown}"]
    return []


def kind_problems(config: Any) -> list[str]:
    """The faults of all fields that say what they take; the other values become plain ones."""
    problems = []
    for field in dataclasses.fields(config):
        if "kind" in field.metadata:
            problems += value_problem(field.name, field.metadata["kind"], vars(config))
    return problems
