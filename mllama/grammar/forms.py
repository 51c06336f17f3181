"""What an answer may be, as the text of a grammar: a value of a JSON schema, calls of functions, or either.

Calls have the JSON form of Llama 3.1, {"name": ..., "parameters": {...}}, one or several with "; " between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DEEPEST = 40
_LONGEST = 120_000  # characters of all schemas of a request
_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
# Text that no reader takes for the beginning of a call.
_FREE_TEXT = r"/[^{\[<\s](.|\n)*/"


class GrammarError(ValueError):
    """A form that no answer can be held to; the words are for the person who asked for it.

    Attributes:
        function: the place among the functions of the one whose arguments are at fault; None: it is the
            schema, or all of them together.
    """

    def __init__(self, message: str, function: int | None = None) -> None:
        super().__init__(message)
        self.function = function


@dataclass(frozen=True)
class Function:
    """A function that may be called, and the JSON schema of its arguments; None: it takes none."""

    name: str
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Calls:
    """The functions that may be called.

    Attributes:
        required: the answer is calls and nothing else.
        several: it may be more than one.
    """

    functions: tuple[Function, ...]
    required: bool = True
    several: bool = True


def grammar_of(schema: Mapping[str, Any] | None, calls: Calls | None) -> str:
    """The grammar of an answer that is a value of the schema, or calls, or either where both are given.

    Calls that are not required leave every other text that does not begin like one.

    Raises: GrammarError for a schema that is too large, too deep, or one that no grammar can hold.
    """
    starts: list[str] = []
    rules: list[str] = []
    if schema is not None:
        starts.append("value")
        rules.append(f"value: %json {_written(schema, None)}")
    if calls is not None:
        starts.append("calls")
        rules.append("calls: call" + (' ("; " call)*' if calls.several else ""))
        names = [f"call_{i}" for i in range(len(calls.functions))]
        rules.append("call: " + " | ".join(names))
        for i, (name, function) in enumerate(zip(names, calls.functions)):
            head = json.dumps(f'{{"name": {json.dumps(function.name)}, "parameters": ')
            rules.append(f'{name}: {head} {name}_of "}}"')
            rules.append(f"{name}_of: %json {_written(_arguments(function), i)}")
        if schema is None and not calls.required:
            starts.append("text")
            rules.append(f"text: {_FREE_TEXT}")
    if (size := sum(map(len, rules))) > _LONGEST:
        raise GrammarError(
            f"the schemas have {size} characters together; at most {_LONGEST} are taken"
        )
    return "\n".join(["%llguidance {}", "start: " + " | ".join(starts), *rules]) + "\n"


def _arguments(function: Function) -> Mapping[str, Any]:
    """The schema of the arguments, which are an object whatever it says."""
    if function.parameters is None:
        return _NO_PARAMETERS
    if "type" in function.parameters:
        return function.parameters
    return {"type": "object", **function.parameters}


def _written(schema: Mapping[str, Any], where: int | None) -> str:
    _check(schema, where)
    # A blank, or a line's end and what the next is indented by: no model fills an answer with them.
    options = {"whitespace_pattern": r"( |\n[ \t]{0,32})"}
    text = json.dumps({**schema, "x-guidance": options})
    if len(text) > _LONGEST:
        raise GrammarError(
            f"the schema has {len(text)} characters; at most {_LONGEST} are taken", where
        )
    return text


def _check(schema: Mapping[str, Any], where: int | None) -> None:
    """Refuse what the grammar would take and not hold."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise GrammarError(
                f"the schema is nested more than {_DEEPEST} levels deep, which is the most that is taken",
                where,
            )
        if isinstance(value, Mapping):
            _check_names(value, where)
            waiting += [(entry, depth + 1) for entry in value.values()]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            waiting += [(entry, depth + 1) for entry in value]


def _check_names(schema: Mapping[str, Any], where: int | None) -> None:
    """Keys beside those that the schema lists may come twice, and JSON's readers keep one of them."""
    least, required = schema.get("minProperties"), schema.get("required")
    listed = len(required) if isinstance(required, Sequence) else 0
    if isinstance(least, int) and least > max(1, listed):
        raise GrammarError(
            f"minProperties is {least} and required names {listed} properties; a grammar cannot count "
            "properties that are not named: expected all of them in required",
            where,
        )


def at_fault(grammar: str, line: int) -> int | None:
    """The place of the function whose arguments are in a line of a grammar, counted from 1."""
    found = re.match(r"call_(\d+)_of:", "".join(grammar.splitlines()[line - 1 : line]))
    return int(found[1]) if found else None
