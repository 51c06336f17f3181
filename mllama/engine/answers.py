"""From the tokens of a sequence to the pieces of its answer: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllama.engine.interface import Token
from mllama.engine.sampling import Likelihood
from mllama.generation.stopping import RowText, StopStrings, special_tokens
from mllama.generation.streaming import text_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer's tokens.

    Attributes:
        tokenizer: that decodes.
        special: text and id of the special tokens.
    """

    tokenizer: Any
    special: Mapping[str, int]

    @classmethod
    def of(cls, processor: Any) -> Vocabulary:
        """Of a processor or tokenizer."""
        return cls(text_tokenizer(processor), special_tokens(processor))

    def token(self, token: int, logprob: float, likeliest: tuple[Token, ...] = ()) -> Token:
        """A token with its text, special ones too."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return Token(text, text.encode(), logprob, likeliest)


class Answer:
    """One answer as it grows.

    Args:
        index: which of a request's answers.
        vocabulary: of the model.
        stop_strings: that end the text.
        stop_token_ids: that end it, too, and have no text.
    """

    def __init__(
        self,
        index: int,
        vocabulary: Vocabulary,
        stop_strings: StopStrings,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.index, self.num_tokens = index, 0
        self._vocabulary, self._stop_token_ids = vocabulary, stop_token_ids
        self._text = RowText(vocabulary.tokenizer, stop_strings)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._text.stopped

    def push(self, token: int, likelihood: Likelihood | None) -> tuple[str, tuple[Token, ...]]:
        """The text that became certain with a token, and what is told of that."""
        self.num_tokens += 1
        text = "" if token in self._stop_token_ids else self._text.push(token)
        if likelihood is None:
            return text, ()
        others = tuple(self._vocabulary.token(*entry) for entry in likelihood.likeliest)
        return text, (self._vocabulary.token(token, likelihood.logprob, others),)

    def end(self) -> str:
        """The text that was held back."""
        return self._text.flush()
