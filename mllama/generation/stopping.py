"""When a sequence is finished: stop tokens, and stop strings across token boundaries."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from mllama.generation.streaming import IncrementalDetokenizer, make_decoder, text_tokenizer


class StopStrings:
    """Stop strings compiled into an automaton that reads a text once, whatever their number.

    A state is the longest end of the text that begins a stop string. Source: Aho, Corasick 1975, "Efficient
    string matching".

    Args:
        stop_strings: none of them empty.

    Attributes:
        depth: per state how long that beginning is.
        found: per state the length of the longest stop string that ends there, 0 for none.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth, self.found = [0], [0]
        for string in stop_strings:
            state = 0
            for character in string:
                state = self._next[state].setdefault(character, len(self._next))
                if state == len(self._next):
                    self._next.append({})
                    self.depth.append(0)
                    self.found.append(0)
            self.found[state] = len(string)
        # Where to continue for a character that does not: the longest end that begins a string as well.
        self._shorter = [0] * len(self._next)
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for character, after in self._next[state].items():
                self.depth[after] = self.depth[state] + 1
                self._shorter[after] = self.step(self._shorter[state], character) if state else 0
                self.found[after] = self.found[after] or self.found[self._shorter[after]]
                queue.append(after)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)


class StopStringScanner:
    """Passes text through until a stop string occurs in it, however the text is cut into pieces.

    The end of the text is held back while it may be the beginning of a stop string. Of several
    stop strings the one that is complete first counts, and of those the longest. The text up to it
    is passed on; the stop string and what follows it are not.
    """

    def __init__(self, stop_strings: StopStrings) -> None:
        self._strings, self._state = stop_strings, 0
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is certain to be no part of a stop string."""
        if self.stopped:
            return ""
        text, state = self._held + piece, self._state
        for end, character in enumerate(piece, start=len(self._held) + 1):
            state = self._strings.step(state, character)
            if length := self._strings.found[state]:
                self.stopped, self._held = True, ""
                return text[: end - length]
        self._state = state
        certain = len(text) - self._strings.depth[state]
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The beginning of a stop string that was never completed, at the end of the text."""
        held, self._held, self._state = self._held, "", 0
        return held


class RowText:
    """The text of one generated sequence: whole characters, no special tokens, ending before a
    stop string.

    Args:
        tokenizer: a processor or tokenizer, see make_decoder().
        stop_strings: that end it.
    """

    def __init__(self, tokenizer: Any, stop_strings: StopStrings) -> None:
        self._detokenizer = IncrementalDetokenizer(make_decoder(tokenizer))
        self._scanner = StopStringScanner(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._scanner.stopped

    def push(self, token: int, is_searched: bool = True) -> str:
        """Add a token; returns the text that became certain.

        Args:
            is_searched: False for tokens at the beginning whose text is passed on as it is.
        """
        text = self._detokenizer.push(token)
        return self._scanner.push(text) if is_searched else text

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
            compiled = StopStrings(strings)
            self.text = [RowText(tokenizer, compiled) for _ in range(batch_size)]
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
