"""Calls of functions in the text of an answer, in the JSON form of Llama 3.1.

An answer is calls if it begins like one: {"name": ..., "parameters": {...}}, perhaps behind <|python_tag|>,
perhaps several with "; " or a line between them, or in an array. Anything else is text, whole.
A call is told when all of it is there: its arguments are JSON whatever ends the answer, and what begins like
a call and is none stays text.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mllama.processing.plain_text import well_formed
from mllama.strict_json import parse_json

_TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"
_KEYS = ("name", "parameters", "arguments", "type", "id")


@dataclass(frozen=True)
class Call:
    """A function's name, and the JSON text of the object of its arguments."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Read:
    """What has become known: text, and the calls behind it."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class CallReader:
    """Reads one answer as it comes.

    Args:
        names: of the functions that may be called.
        several: read more than the first call.
    """

    def __init__(self, names: Collection[str], several: bool = True) -> None:
        self._names = names
        self._several = several
        self._is_text = False
        self._count = 0
        self._held = ""
        self._scan = _Scan()

    @property
    def found(self) -> bool:
        """Whether there was a call."""
        return self._count > 0

    def feed(self, text: str) -> Read:
        """The next piece of the answer."""
        if self._is_text:
            return Read(text)
        self._held += text
        calls: list[Call] = []
        while (start := self._start()) is not None:
            end = self._scan.end(self._held, start)
            if end is None:
                break
            call = self._call(self._held[start:end])
            if call is None:
                self._is_text = True
                break
            if self._several or not self.found:
                calls.append(call)
            self._count += 1
            self._held, self._scan = self._held[end:], _Scan()
        return Read(self._released() if self._is_text else "", tuple(calls))

    def finish(self) -> Read:
        """What the answer's end leaves: a call that is not whole is text."""
        rest = self._released()
        is_nothing = self.found and not rest.strip(_BETWEEN + "]")
        return Read("" if is_nothing else rest)

    def _released(self) -> str:
        text, self._held = self._held, ""
        return text

    def _start(self) -> int | None:
        """Where the next object begins; None where that is not known yet, or nothing of the kind does."""
        text, at = self._held, 0
        marks = [] if self.found else [_TAG, "["]
        while True:
            at += len(text[at:]) - len(text[at:].lstrip(_BETWEEN if self.found else None))
            rest = text[at:]
            if not rest or any(mark.startswith(rest) and rest != mark for mark in marks):
                return None
            mark = next((mark for mark in marks if rest.startswith(mark)), None)
            if mark is None:
                break
            marks = marks[marks.index(mark) + 1 :]
            at += len(mark)
        if rest[0] == "{":
            return at
        is_end = self.found and rest[0] == "]" and not rest[1:].strip(_BETWEEN)
        self._is_text = not is_end
        return None

    def _call(self, text: str) -> Call | None:
        found = _loaded(text)
        if not isinstance(found, dict) or not found.keys() <= set(_KEYS):
            return None
        name = found.get("name")
        keys = [key for key in ("parameters", "arguments") if key in found]
        if not isinstance(name, str) or name not in self._names or len(keys) != 1:
            return None
        if found.get("type", "function") != "function":
            return None
        arguments = found[keys[0]]
        if isinstance(arguments, str):  # JSON in JSON, as some answers have it
            arguments = _loaded(arguments)
        if not isinstance(arguments, dict):
            return None
        try:
            return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        except ValueError:  # a number beyond those of JSON's readers
            return None


class _Scan:
    """Looks for the end of an object, and at its first key, going over no character twice."""

    def __init__(self) -> None:
        self._at: int | None = None
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: int | None = None
        self._has_key = False

    def end(self, text: str, start: int) -> int | None:
        """The position behind it; None: it is not there yet; the start: its first key is no call's."""
        at = start if self._at is None else self._at
        while at < len(text):
            sign = text[at]
            at += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                if sign == "\\":
                    self._escaped = True
                elif sign == '"':
                    self._in_string = False
                    if not self._has_key:
                        self._has_key = True
                        if text[self._key : at - 1] not in _KEYS:
                            return start
            elif sign == '"':
                self._in_string = True
                self._key = at
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    self._at = at
                    return at
        self._at = at
        return None


def _loaded(text: str) -> Any:
    """The value of a JSON text; None for what is none. A name that is there twice counts once, and halves of
    characters are replaced."""
    try:
        return parse_json(text)
    except ValueError:
        pass
    try:
        return json.loads(well_formed(json.dumps(json.loads(text), ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None
