"""When a sequence is finished: stop tokens, and stop strings across token boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mllama.generation.streaming import IncrementalDetokenizer, make_decoder, text_tokenizer


class StopStringScanner:
    """Passes text through until a stop string occurs in it, however the text is cut into pieces.

    The end of the text is held back while it may be the beginning of a stop string. Of several
    stop strings the one that is complete first counts, and of those the longest. The text up to it
    is passed on; the stop string and what follows it are not.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is certain to be no part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stop_strings if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The beginning of a stop string that was never completed, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop but is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class RowText:
    """The text of one generated sequence: whole characters, no special tokens, ending before a
    stop string.

    Args:
        tokenizer: a processor or tokenizer, see make_decoder().
        stop_strings: none of them empty.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._detokenizer = IncrementalDetokenizer(make_decoder(tokenizer))
        self._scanner = StopStringScanner(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._scanner.stopped

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain."""
        return self._scanner.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """What is still held back, at the end of the sequence."""
        return self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()


class StopCondition:
    """Decides on the host, token by token, which rows of a batch are finished.

    A stop token is part of the generated ids and not of the text. The token that completes a stop
    string is the last of the ids; the text ends before the stop string. Only generated text is
    searched. A stop string that is itself a special token, such as "<|eot_id|>", acts as that stop
    token, because special tokens have no text.

    Args:
        batch_size: rows.
        eos_token_ids: the stop tokens.
        stop_strings: none of them empty.
        tokenizer: a processor or tokenizer; needed for stop strings and for ``text``.
    """

    def __init__(
        self,
        batch_size: int,
        eos_token_ids: Iterable[int],
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
    ) -> None:
        special = special_tokens(tokenizer) if tokenizer is not None else {}
        self._eos = frozenset(eos_token_ids) | {special[s] for s in stop_strings if s in special}
        strings = [s for s in stop_strings if s not in special]
        self.text: list[RowText] = []
        if tokenizer is not None:
            self.text = [RowText(tokenizer, strings) for _ in range(batch_size)]
        self.finished = [False] * batch_size

    def push(self, row: int, token: int) -> str:
        """Add the next token of an unfinished row; returns its text that became certain."""
        if token in self._eos:
            self.finished[row] = True
            return ""
        if not self.text:
            return ""
        piece = self.text[row].push(token)
        self.finished[row] = self.text[row].stopped
        return piece


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of the special tokens of a processor, ``tokenizers.Tokenizer`` or one of
    ``transformers``; empty where the tokenizer does not tell."""
    inner = text_tokenizer(tokenizer)
    inner = getattr(inner, "backend_tokenizer", inner)
    added = inner.get_added_tokens_decoder() if hasattr(inner, "get_added_tokens_decoder") else {}
    return {token.content: index for index, token in added.items() if token.special}
