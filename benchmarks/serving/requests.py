"""What is asked: pictures that the demo model knows how to describe, and questions about them."""

from __future__ import annotations

import io
import itertools
import json
import random
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mllama.demo import questions_for, sample_picture
from mllama.demo.questions import vocabulary_texts

LONGEST = 64  # tokens of an answer
_TILES = 4  # of the largest pictures


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        text: the question.
        picture: the bytes of a PNG; None for words alone.
        tokens: how long the answer has to be; None: as long as it naturally is, up to LONGEST.
        with_stops: such an answer goes on behind stop tokens, which have no text, and is not kept from them.
    """

    text: str
    picture: bytes | None = None
    tokens: int | None = None
    with_stops: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """As chat completions take them."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.picture is not None:
            url = f"data:image/png;base64,{b64encode(self.picture).decode()}"
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return [{"role": "user", "content": parts}]


@dataclass
class Source:
    """Requests, none of them with a picture or a prompt that another had.

    Attributes:
        seed: of the first; each has its own.
    """

    seed: int
    _seeds: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self._seeds = itertools.count(self.seed)

    def distinct(
        self, count: int, tokens: int | None = None, with_stops: bool = False
    ) -> list[Request]:
        """Each with a picture of its own."""
        return [self._about(next(self._seeds), tokens, with_stops) for _ in range(count)]

    def same(self, count: int) -> list[Request]:
        """All with one picture, which is new, and a question of it in turn."""
        seed = next(self._seeds)
        picture, scene = png_of(seed), sample_picture(seed)[1]
        questions = [question for question, _ in questions_for(scene, seed)]
        return [Request(questions[i % len(questions)], picture) for i in range(count)]

    def large(self, tokens: int) -> Request:
        """With a picture of as many tiles as there may be."""
        while True:
            seed = next(self._seeds)
            rows, columns = sample_picture(seed)[1].layout
            if rows * columns == _TILES:
                return self._about(seed, tokens)

    def words(self, length: int, count: Callable[[str], int]) -> str:
        """A text of about so many tokens, and no more, whose beginning is new as well.

        Args:
            count: tokens of a text.
        """
        drawn, found = random.Random(next(self._seeds)), ""
        texts = vocabulary_texts()
        while count(longer := f"{found} {drawn.choice(texts)}") <= length:
            found = longer
        return found.strip()

    def _about(self, seed: int, tokens: int | None, with_stops: bool = False) -> Request:
        questions = questions_for(sample_picture(seed)[1], seed)
        return Request(questions[seed % len(questions)][0], png_of(seed), tokens, with_stops)


def png_of(seed: int) -> bytes:
    buffer = io.BytesIO()
    sample_picture(seed)[0].save(buffer, "PNG")
    return buffer.getvalue()


def our_body(model: str, request: Request) -> dict[str, Any]:
    """The request to our server."""
    body = _body(model, request) | {"stream_options": {"include_usage": True}}
    if request.tokens is None:
        return body
    return body | ({"ignore_eos": True} if request.with_stops else {"min_tokens": request.tokens})


def peer_body(model: str, request: Request, generation: dict[str, Any]) -> dict[str, Any]:
    """The request to `transformers serve`, which takes the least length in a generation config, and has no
    other way to make an answer longer.

    Args:
        generation: the checkpoint's, which the request's replaces.
    """
    body = _body(model, request)
    if request.tokens is None:
        return body
    config = generation | {"min_new_tokens": request.tokens, "max_new_tokens": request.tokens}
    return body | {"generation_config": json.dumps(config)}


def _body(model: str, request: Request) -> dict[str, Any]:
    longest = LONGEST if request.tokens is None else request.tokens
    return {
        "model": model,
        "messages": request.messages(),
        "max_tokens": longest,
        "temperature": 0,
    }
