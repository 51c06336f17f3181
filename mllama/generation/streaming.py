"""From token ids to text, piece by piece, without ever splitting a character."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

from torch import Tensor

from mllama.wording import quoted

# A character is at most four bytes long, so at most three of them can wait for the rest. A decoder
# shows them as one replacement character, or as one each.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_INCOMPLETE = 3

# Decoding starts over once this many tokens were decoded, with the last few as context: enough for
# decoders that treat the first token apart, and the cost per token stays constant.
_WINDOW = 64
_CONTEXT = 8


class Streamer(Protocol):
    """What ``generate(streamer=...)`` talks to; the streamers of ``transformers`` fit.

    put() receives the prompt, (B, L) int64 on the host, then the tokens of each step, (B,); end()
    is called once at the end.
    """

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def check_streamer(streamer: Any) -> None:
    """Raises: TypeError for what is neither None nor a Streamer."""
    if streamer is None or all(callable(getattr(streamer, n, None)) for n in ("put", "end")):
        return
    raise TypeError(f"streamer must have the methods put and end, got {quoted(streamer)}")


def text_tokenizer(tokenizer: Any) -> Any:
    """The object that decodes: a processor's tokenizer, or the tokenizer itself.

    Raises: TypeError if there is no decode method.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(getattr(inner, "decode", None)):
        name = type(tokenizer).__name__
        raise TypeError(f"tokenizer must be a processor or have a decode method, got {name}")
    return inner


def make_decoder(
    tokenizer: Any, skip_special_tokens: bool = True
) -> Callable[[Sequence[int]], str]:
    """A function from token ids to text, for a processor, ``tokenizers.Tokenizer`` or one of
    ``transformers``.

    Raises: TypeError if ``tokenizer`` cannot decode.
    """
    decode = text_tokenizer(tokenizer).decode
    options: dict[str, bool] = {"skip_special_tokens": skip_special_tokens}
    # The clean-up of transformers rewrites text that was handed out already.
    if "clean_up_tokenization_spaces" in inspect.signature(decode).parameters:
        options["clean_up_tokenization_spaces"] = False
    return lambda ids: decode(list(ids), **options)


def _certain_length(text: str) -> int:
    """How many characters of the text no further token can change."""
    return max(len(text.rstrip(_REPLACEMENT)), len(text) - _LONGEST_INCOMPLETE)


class IncrementalDetokenizer:
    """Turns a stream of tokens into pieces of text that add up to the text of all tokens.

    A piece never ends within a character: while the last bytes may be the start of a longer
    character they are held back, at most three of them. Bytes that can no longer become a
    character, and those still held back at the end, come out as U+FFFD.

    Args:
        decode: from token ids to text, for instance from make_decoder().
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._emitted = 0  # characters of decode(self._ids) that were handed out

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain, often one word, possibly none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = _certain_length(text)
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        if len(self._ids) >= _WINDOW:
            context = self._ids[-_CONTEXT:]
            context_text = self._decode(context)
            context_certain = _certain_length(context_text)
            if context_text[context_certain:] == text[certain:]:  # it holds what is held back
                self._ids, self._emitted = context, context_certain
        return piece

    def flush(self) -> str:
        """The text held back, at the end of the stream; the next token starts a new text."""
        piece = self._decode(self._ids)[self._emitted :]
        self._ids, self._emitted = [], 0
        return piece


class TextStreamer:
    """Writes the text of one sequence to a file as it is generated, for ``generate(streamer=...)``.

    Args:
        tokenizer: a processor, a ``tokenizers.Tokenizer`` or a tokenizer of ``transformers``.
        skip_prompt: leave out the prompt.
        skip_special_tokens: leave out special tokens.
        file: where to write; standard output by default.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        skip_special_tokens: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(make_decoder(tokenizer, skip_special_tokens))
        self._skip_prompt = skip_prompt
        self._at_prompt = True
        self._file = file

    def put(self, value: Tensor) -> None:
        """Write the tokens in value, (L,) or (1, L). Raises: ValueError for more than one row."""
        if value.dim() > 1 and len(value) != 1:
            raise ValueError(f"a TextStreamer writes one sequence, got a batch of {len(value)}")
        at_prompt, self._at_prompt = self._at_prompt, False
        if at_prompt and self._skip_prompt:
            return
        self._write("".join(map(self._detokenizer.push, value.flatten().tolist())))

    def end(self) -> None:
        """Write what is left and a newline; the next put() starts a new sequence."""
        self._write(self._detokenizer.flush() + "\n")
        self._at_prompt = True

    def _write(self, text: str) -> None:
        print(text, end="", flush=True, file=self._file or sys.stdout)
