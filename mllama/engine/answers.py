"""From the tokens of a sequence to the pieces of its answer: whole characters, up to a stop string."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mllama.engine.interface import Token
from mllama.engine.sampling import Likelihood
from mllama.generation.stopping import RowText, StopStrings, special_tokens
from mllama.generation.streaming import text_tokenizer
from mllama.processing.byte_level import is_byte_level, token_bytes

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer's tokens.

    Attributes:
        tokenizer: that decodes.
        special: text and id of the special tokens.
        byte_level: the ``tokenizers.Tokenizer`` where its tokens are bytes, which may be parts of
            characters.
    """

    tokenizer: Any
    special: Mapping[str, int]
    byte_level: Any = None

    @classmethod
    def of(cls, processor: Any) -> Vocabulary:
        """Of a processor or tokenizer."""
        tokenizer = text_tokenizer(processor)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        knows_bytes = hasattr(backend, "to_str") and is_byte_level(backend)
        return cls(tokenizer, special_tokens(processor), backend if knows_bytes else None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Of the tokens that have no text in an answer."""
        return frozenset(self.special.values())

    def token(self, token: int, logprob: float, likeliest: tuple[Token, ...] = ()) -> Token:
        """A token with its text, special ones too, and its bytes."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return Token(text, self._data(token, text), logprob, likeliest)

    def _data(self, token: int, text: str) -> bytes:
        if _REPLACEMENT in text and self.byte_level is not None:  # it may stand for a part of one
            name = self.byte_level.id_to_token(token)
            if _REPLACEMENT not in name:  # as in one that was added with it
                return token_bytes(name)
        return text.encode()


class Answer:
    """One answer as it grows.

    Args:
        index: which of a request's answers.
        vocabulary: of the model.
        stop_strings: that end the text.
        stop_token_ids: that end it, too, and have no text.
        min_tokens: of the answer; a stop string in the text of fewer does not end it.
    """

    def __init__(
        self,
        index: int,
        vocabulary: Vocabulary,
        stop_strings: StopStrings,
        stop_token_ids: frozenset[int],
        min_tokens: int = 0,
    ) -> None:
        self.index, self.num_tokens = index, 0
        self._vocabulary, self._stop_token_ids = vocabulary, stop_token_ids
        self._min_tokens = min_tokens
        self._characters, self._offset = getincrementaldecoder("utf-8")("replace"), 0
        self._text = RowText(vocabulary.tokenizer, stop_strings)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._text.stopped

    def push(self, token: int, likelihood: Likelihood | None) -> tuple[str, tuple[Token, ...]]:
        """The text that became certain with a token, and what is told of that."""
        self.num_tokens += 1
        text = ""
        if token not in self._stop_token_ids:
            text = self._text.push(token, self.num_tokens >= self._min_tokens)
        if likelihood is None:
            return text, ()
        others = tuple(self._vocabulary.token(*entry) for entry in likelihood.likeliest)
        told = self._vocabulary.token(token, likelihood.logprob, others)
        data = b"" if token in self._vocabulary.special_ids else told.data
        return text, (replace(told, offset=self._place(data)),)

    def _place(self, data: bytes) -> int:
        """The characters before the bytes that go on with the text; a part of one that they do not complete
        is a character, too."""
        # What the first byte ends is what came before it, or what it goes on with.
        part, _ = self._characters.getstate()
        place, self._offset = self._offset, self._offset + len(self._characters.decode(data))
        if part and data:
            try:
                getincrementaldecoder("utf-8")().decode(part + data[:1])
            except UnicodeDecodeError:
                return place + len(part.decode("utf-8", "replace"))
        return place

    def end(self) -> str:
        """The text that was held back."""
        return self._text.flush()
