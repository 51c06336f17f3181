"""Encoding and decoding by a tokenizer: in this process, or in one of its own where its parts are not known.

What is promised for a tokenizer.json that is not trusted: its size is bounded before it is read
(`tokenizer_parts`), and if all its parts are known ones, whose cost grows only with the text, it runs here.
Any other (an unknown regular expression, a replacement that makes texts many times longer, a rare kind of
part) is loaded, encodes and decodes in a child with limits of time and memory (`confined`), so that a pattern
that backtracks forever, a text that grows without end or a crash of the library is a ValueError that names
the file. A file that its child has loaded is loaded here as well, for its vocabulary. Of what it could run,
only its normalizer is run here, on added tokens, after they have passed through it there.
The library's panics, which are no `Exception` in Python, become a ValueError in either case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Encoding, Tokenizer

from mllama.confined import ConfinedError, Workers, package_paths
from mllama.wording import reason

_MEMORY = 2**30
_SECONDS, _SECONDS_PER_CHARACTER = 10.0, 5e-6  # common tokenizers take 1e-6
# Characters of an answer: of a token five numbers, of which a text has at most a few for each character.
_ANSWER, _ANSWER_PER_CHARACTER, _LONGEST_ANSWER = 2**16, 200, 2**27
_FAILS, _NO_ANSWER = "the tokenizer of {} fails", "its process gives no answer that is one"
_WORKERS = Workers(
    Path(__file__).with_name("tokenizer_job.py"), lambda: package_paths("tokenizers")
)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text, as `tokenizers.Encoding` has them."""

    ids: list[int]
    type_ids: list[int]
    special_tokens_mask: list[int]
    offsets: list[tuple[int, int]]


class Encoder(Protocol):
    """Texts to tokens and back. Raises: ValueError where the tokenizer fails."""

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> Sequence[Encoding | Encoded]:
        """The tokens of each text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of tokens."""
        ...


@contextmanager
def failures_named(what: str) -> Iterator[None]:
    """Raise what the library raises, a panic or a bare Exception, as a ValueError that begins so."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {reason(error)}") from None


class NativeEncoder:
    """A tokenizer in this process.

    Args:
        backend: the tokenizer.
        name: of its file, for errors.
    """

    def __init__(self, backend: Tokenizer, name: str) -> None:
        self._backend, self._fails = backend, _FAILS.format(name)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoding]:
        with failures_named(self._fails):
            return self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        with failures_named(self._fails):
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


class ConfinedEncoder:
    """A tokenizer in a process of its own.

    Args:
        file: its tokenizer.json.
        name: of the file, for errors.
        plain: read special tokens as text.
    """

    def __init__(self, file: str, name: str, plain: bool = False) -> None:
        self._file, self._name = file, name
        key = hashlib.sha256(file.encode("utf-8", "surrogatepass")).hexdigest()
        self._request = {"key": key, "plain": plain}

    def load(self) -> None:
        """Load it there. Raises: ValueError naming the file where that fails."""
        self._ask({}, 0, "{} is not a tokenizer")

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoded]:
        texts = list(texts)
        request = {"texts": texts, "special": add_special_tokens}
        rows = self._ask(request, sum(map(len, texts)))
        if not (isinstance(rows, list) and len(rows) == len(texts) and all(map(_is_row, rows))):
            raise self._error(_NO_ANSWER, _FAILS)
        return [Encoded(ids, kinds, mask, list(zip(b, e))) for ids, kinds, mask, b, e in rows]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        request = {"ids": list(ids), "skip": skip_special_tokens}
        text = self._ask(
            request, 4 * len(ids)
        )  # a token has more characters than a character tokens
        if not isinstance(text, str):
            raise self._error(_NO_ANSWER, _FAILS)
        return text

    def _ask(self, request: dict[str, Any], size: int, what: str = _FAILS) -> Any:
        loading = {"file": self._file, **self._request}
        for known in (self._request, loading):
            try:
                value, text = _WORKERS.call(
                    {**request, **known},
                    seconds=_SECONDS + _SECONDS_PER_CHARACTER * (size + len(known.get("file", ""))),
                    memory=_MEMORY,
                    longest=min(_ANSWER + _ANSWER_PER_CHARACTER * size, _LONGEST_ANSWER),
                )
            except ConfinedError as error:
                raise self._error(str(error), what) from None
            if not isinstance(value, dict) or "error" in value:
                said = value.get("error") if isinstance(value, dict) else None
                raise self._error(reason(ValueError(said)), what)
            if value == {"ok": True}:
                try:
                    return json.loads(text) if text else None
                except (ValueError, RecursionError):
                    break
        raise self._error(_NO_ANSWER, what)

    def _error(self, why: str, what: str) -> ValueError:
        return ValueError(
            f"{what.format(self._name)}: {why} (it has parts that are not known, and so runs in a "
            "process of its own, within limits)"
        )


def _is_row(row: Any) -> bool:
    if not (isinstance(row, list) and len(row) == 5 and all(isinstance(c, list) for c in row)):
        return False
    return len({len(column) for column in row}) == 1 and all(
        type(number) is int and 0 <= number < 2**32 for column in row for number in column
    )
