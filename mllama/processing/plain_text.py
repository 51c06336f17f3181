"""Words of a user as text: whatever Unicode they hold, and with special tokens in them kept plain.

Special tokens are plain where a mark stands inside them: the mark is a character of no meaning, which a chat
template carries along and the tokenizer leaves out (see `MllamaTokenizer.__call__`). So a template's own
tokens keep their ids, and no word of a message becomes one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import quote

# Unicode's noncharacters for internal use: no text that is exchanged holds them.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Entries of a content part that choose or hold a picture, and are not words.
_NOT_WORDS = ("type", "image", "path", "url", "base64")


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
    used: set[str] = set()
    for text in _strings(values):
        used |= {mark for mark in _MARKS if mark in text or any(f in text for f in _forms(mark))}
    marks = [mark for mark in _MARKS if mark not in used]
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

    Args:
        value: a string, or lists and dicts with strings inside, such as messages.
        special_tokens: of the tokenizer.
        mark: see `unused_marks`.
    """
    # Words could bring punctuation to a token: "<|" + "user" + "|>" is still the template's own.
    signs = {
        c for token in special_tokens for c in token if not (c.isalnum() or c.isspace() or c == "_")
    }
    breaks = re.compile("|".join(map(re.escape, sorted(signs)))) if signs else None
    whole = re.compile("|".join(map(re.escape, special_tokens))) if special_tokens else None

    def escape(item: Any) -> Any:
        if isinstance(item, str):
            text = well_formed(item)
            text = breaks.sub(lambda m: m[0] + mark, text) if breaks else text
            return whole.sub(lambda m: m[0][0] + mark + m[0][1:], text) if whole else text
        if isinstance(item, Mapping):
            is_part = "type" in item
            return {
                key: content if is_part and key in _NOT_WORDS else escape(content)
                for key, content in item.items()
            }
        return [escape(content) for content in item] if isinstance(item, (list, tuple)) else item

    return escape(value)


def _forms(mark: str) -> tuple[str, ...]:
    return f"\\u{ord(mark):04x}", f"\\u{ord(mark):04X}", quote(mark)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
