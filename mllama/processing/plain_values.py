"""Plain copies of what a template reads: only data, nothing with methods of its own or ways to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllama.wording import quoted, shown

# What something is called: a name, or the place of what holds it and the key or index there. It becomes text
# only where there is an error to report, for there may be a million of them.
_Place = Any

_DEEPEST = 100
_MOST_VALUES = 2**20
_FEWEST_VALUES = 2**12  # that are taken however short the text may be
_TEXT_PER_VALUE = 4  # characters; a word of JSON with its comma has as many
_IMAGE = {"type": "image"}


class PlainCopies:
    """Makes plain copies, all of them together within one limit.

    Copied are dicts, lists, strings, numbers and None; tuples become lists, subclasses what they extend.

    Args:
        max_text: characters of all strings.
    """

    def __init__(self, max_text: int) -> None:
        self.max_text = max_text
        self.max_values = min(max(max_text // _TEXT_PER_VALUE, _FEWEST_VALUES), _MOST_VALUES)
        self.characters = self.values = 0

    def value(self, value: Any, place: str) -> Any:
        """A copy of a value that is called `place`.

        Raises: TypeError naming the place of anything else, and of a key that is no string; ValueError for
            what is nested too deeply or holds itself, and for too many values or characters.
        """
        return self._copied(value, place, 0)

    def messages(self, conversation: Sequence[Any]) -> list[Any]:
        """As `value`; an image part becomes {"type": "image"}, whatever it holds."""
        messages = []
        for i, message in enumerate(conversation):
            place = f"messages[{i}]"
            content = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(content, (list, tuple)):
                messages.append(self._copied(message, place, 1))
                continue
            parts = [
                dict(_IMAGE) if _is_image(part) else self._copied(part, ((place, "content"), j), 3)
                for j, part in enumerate(content)
            ]
            copied: dict[str, Any] = {}  # in the order given: templates may write a message as JSON
            for key, value in message.items():
                copied |= {key: parts} if key == "content" else self._copied({key: value}, place, 1)
            messages.append(copied)
        return messages

    def count_again(self, times: int, place: str) -> None:
        """Count all that was copied so far so many times more: it will be copied as often.

        Raises: ValueError as `value`.
        """
        self._count(self.values * times, self.characters * times, place)

    def _copied(self, value: Any, place: _Place, depth: int) -> Any:
        self._count(1, 0, place)
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            self._count(0, len(value), place)
            return str.__str__(value)
        if isinstance(value, int):
            self._count(0, value.bit_length() // 3, place)
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if depth > _DEEPEST:
            raise ValueError(
                f"{_named(place)} is nested more than {_DEEPEST} deep, or holds itself"
            )
        if isinstance(value, Mapping):
            items = dict.items(value) if isinstance(value, dict) else value.items()
            return {
                self._key(key, place): self._copied(item, (place, key), depth + 1)
                for key, item in items
            }
        if isinstance(value, (list, tuple)):
            items = list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)
            return [self._copied(item, (place, i), depth + 1) for i, item in enumerate(items)]
        raise TypeError(
            f"{_named(place)} is a {type(value).__name__}; templates read dicts, lists, strings, numbers and "
            "None"
        )

    def _key(self, key: Any, place: _Place) -> str:
        if not isinstance(key, str):
            raise TypeError(
                f"{_named(place)} has a key that is a {type(key).__name__}; keys are strings"
            )
        self._count(0, len(key), place)
        return str.__str__(key)

    def _count(self, values: int, characters: int, place: _Place) -> None:
        self.values += values
        self.characters += characters
        if self.values > self.max_values:
            raise ValueError(
                f"{_named(place)} and what is before it are more than {self.max_values} values"
            )
        if self.characters > self.max_text:
            raise ValueError(
                f"{_named(place)} and what is before it have more than {self.max_text} characters (max_text)"
            )


def _named(place: _Place) -> str:
    keys = []
    while isinstance(place, tuple):
        place, key = place
        keys.append(f"[{quoted(key)}]")
    return shown("".join([place, *reversed(keys)]))


def _is_image(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(kind, str) and kind == "image"
