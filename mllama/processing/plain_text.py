"""Words of a user as text: whatever Unicode they hold, and with special tokens in them kept plain.

Special tokens are plain where a mark stands inside them: the mark is a character of no meaning, which a chat
template copies and the tokenizer leaves out (see `MllamaTokenizer.__call__`). So a template's own
tokens keep their ids, and no word of a message becomes one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from mllama.processing.conversation import ROLES

# Unicode's noncharacters for internal use: no text that is exchanged holds them.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# One of them, or what JSON in ASCII or a URL writes for it.
_ANY_MARK = re.compile(
    "[\ufdd0-\ufdef]|\\\\ufd[de][0-9a-f]|\\\\uFD[DE][0-9A-F]|%EF%B7%[9A][0-9A-F]"
)
# Words of the messages' own format, by which templates find and compare entries.
_FIXED: dict[str, tuple[str, ...]] = {"role": ROLES, "type": ("text", "image", "function")}
_FORMAT = frozenset(
    "role content type text image name id tool_calls tool_call_id function arguments parameters "
    "description properties required title".split()
)
_DEEPEST = 100


def well_formed(text: str) -> str:
    """The text with every lone surrogate replaced by U+FFFD and pairs of them joined, as browsers do."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def from_command_line(text: str) -> str:
    """An argument as text: its bytes that are no UTF-8 become U+FFFD, a cut character becomes one."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return well_formed(text)


def unused_marks(values: Any, count: int) -> list[str]:
    """Marks that occur in none of the strings inside. Raises: ValueError when there are not so many."""
    # As one text: there may be a million of them. No form of a mark has a line feed in it.
    found = set(_ANY_MARK.findall("\n".join(_strings(values))))
    marks = [mark for mark in _MARKS if found.isdisjoint((mark, *_forms(mark)))]
    if len(marks) < count:
        raise ValueError("the text holds nearly all of the noncharacters U+FDD0 to U+FDEF")
    return marks[:count]


def check_marked(text: str, mark: str) -> None:
    """Raises: ValueError for a text in which a template has written the mark by other characters."""
    if any(form in text for form in _forms(mark)):
        raise ValueError(
            "the chat template writes words in ASCII or as a URL, which escape_special_tokens cannot follow"
        )


def escaped(value: Any, special_tokens: Collection[str], mark: str) -> Any:
    """A copy in which no words, and no concatenation of them, hold a special token.

    Keys are words too: a template may write them. Those of the messages' own format stay, and so do roles and
    the types of parts.

    Args:
        value: a string, or lists and dicts with strings inside, such as messages.
        special_tokens: of the tokenizer.
        mark: see `unused_marks`.
    Raises: TypeError for another kind of value; ValueError for what is nested too deeply.
    """
    breaks = str.maketrans({sign: sign + mark for sign in _breaking(special_tokens)})

    def escape(item: Any, depth: int) -> Any:
        if isinstance(item, str):
            return well_formed(item).translate(breaks)
        if item is None or isinstance(item, (bool, int, float)):
            return item
        if depth > _DEEPEST:
            raise ValueError(f"values are nested more than {_DEEPEST} deep")
        if isinstance(item, Mapping):
            return {
                key if key in _FORMAT else escape(key, depth): content
                if isinstance(content, str) and content in _FIXED.get(key, ())
                else escape(content, depth + 1)
                for key, content in item.items()
            }
        if isinstance(item, (list, tuple)):
            return [escape(content, depth + 1) for content in item]
        raise TypeError(f"words are strings, in lists and dicts, got {type(item).__name__}")

    return escape(value, 0)


def _breaking(special_tokens: Collection[str]) -> set[str]:
    """Characters such that a mark after each is inside every special token that words make.

    Punctuation where a token has any before its end: "<|" + "user" + "|>" is still the template's own.
    """
    breaking: set[str] = set()
    for token in filter(None, special_tokens):
        signs = {c for c in token[:-1] if not (c.isalnum() or c.isspace() or c == "_")}
        breaking |= signs or {token[0]}
    return breaking


def _forms(mark: str) -> tuple[str, ...]:
    return f"\\u{ord(mark):04x}", f"\\u{ord(mark):04X}", quote(mark)


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]  # not recursive, where every string would pass through all levels above it
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, Mapping):
            waiting += item
            waiting += item.values()
