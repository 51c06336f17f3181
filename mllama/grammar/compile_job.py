"""The job of the process in which grammars are compiled for the first time: only `llguidance`.

It is run by `mllama.confined`, by its path: a schema can take minutes, all memory, or the stack.
"""

from __future__ import annotations

from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_END = 256
# What has most behind it comes first.
_ORDER = (*b'{["', *range(0x21, _END), *range(0x21))
_STEPS = 12


class _Bytes:
    """A vocabulary of single bytes, and a token that ends."""

    eos_token_id = _END
    bos_token_id = None
    special_token_ids = (_END,)
    is_tokenizer_wrapper = True
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


_TOKENIZER = LLTokenizer(_Bytes(), eos_token=[_END])
_LIMITS = LLParserLimits(verbose_errors=False)


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Whether "grammar" can be compiled and an answer begun: {"ok": true} or {"error": reason}."""
    try:
        matcher = LLMatcher(_TOKENIZER, request["grammar"], log_level=0, limits=_LIMITS)
        _walk(matcher)
        error = matcher.get_error()
    except MemoryError:
        raise
    except BaseException as found:  # a panic of Rust's is no Exception
        error = str(found) or type(found).__name__
    return ({"error": error[:2000]} if error else {"ok": True}), ""


def _walk(matcher: LLMatcher) -> None:
    """Write the beginning of an answer: some grammars are too complex only there."""
    for _ in range(_STEPS):
        if matcher.is_stopped():  # by an error too
            return
        mask = matcher.compute_bitmask()
        allowed = (i for i in _ORDER if mask[i // 8] >> i % 8 & 1)
        matcher.consume_token(next(allowed, _END))
