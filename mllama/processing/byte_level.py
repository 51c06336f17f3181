"""The tokens of a byte-level tokenizer as the bytes that they are."""

from __future__ import annotations

import json
from typing import Any


def is_byte_level(backend: Any) -> bool:
    """Whether the tokens of a ``tokenizers.Tokenizer`` are bytes, as those of Llama 3."""
    return "ByteLevel" in _kinds(json.loads(backend.to_str())["decoder"])


def token_bytes(token: str) -> bytes:
    """Of a token as the vocabulary writes it. Raises: KeyError for what is no byte."""
    return bytes(map(_BYTES.__getitem__, token))


def _kinds(part: Any) -> set[str]:
    """The kinds of a decoder, and of those that it is a sequence of."""
    if not isinstance(part, dict):
        return set()
    inside = part.get("decoders") or []
    return {str(part.get("type"))}.union(*map(_kinds, inside))


def _byte_values() -> dict[str, int]:
    """The bytes that characters of tokens stand for: visible ones for themselves, others by U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _byte_values()
