"""Bodies and events of answers, from pieces as an engine gives them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mllama.engine.interface import Piece, Token, Usage
from mllama.server import answers
from mllama.server.sse import event_bytes
from mllama.strict_json import parse_json

HEADING = answers.Heading("a", "demo", 0)
SHAPES = [
    (answers.chat_body, answers.chat_events),
    (answers.completion_body, answers.completion_events),
]


async def pieces(*tokens: Token) -> AsyncIterator[Piece]:
    for token in tokens:
        yield Piece(text=token.text, tokens=(token,))
    yield Piece(finish_reason="stop", usage=Usage(1, len(tokens)))


def told(make_body: Any, make_events: Any, *tokens: Token) -> list[Any]:
    """What is sent of the logprobs: in a body, and in the events of a stream."""

    async def run() -> list[bytes]:
        found = await answers.collected(pieces(*tokens), 1)
        sent = [json.dumps(make_body(HEADING, *found, True)).encode()]
        async for event in make_events(HEADING, pieces(*tokens), 1, True, False):
            sent.append(event_bytes(event).removeprefix(b"data: "))
        return sent

    sent = [parse_json(data.decode()) for data in asyncio.run(run())]  # which knows no Infinity
    return [entry["choices"][0]["logprobs"] for entry in sent]


@pytest.mark.parametrize(("make_body", "make_events"), SHAPES, ids=["chat", "text"])
def test_what_the_model_rules_out_is_a_number_in_json(make_body, make_events):
    ruled_out = Token("b", b"b", -math.inf)
    token = Token("a", b"a", -math.inf, (Token("a", b"a", 0.0), ruled_out))
    sent = [logprobs for logprobs in told(make_body, make_events, token) if logprobs]
    assert len(sent) >= 2
    for logprobs in sent[:2]:
        words = json.dumps(logprobs)
        assert words.count("-9999.0") == 2 and "Infinity" not in words


def test_parts_of_characters_have_names_that_differ():
    likeliest = (
        Token("�", b"\xc3", -0.5),
        Token("�", b"\xf0\x9f", -1.0),
        Token("�", b"\xef\xbf\xbd", -2),
    )
    token = Token("�", b"\xc3", -0.5, likeliest)
    for logprobs in told(*SHAPES[1], token)[:2]:
        assert logprobs["tokens"] == ["bytes:\\xc3"]
        expected = {"bytes:\\xc3": -0.5, "bytes:\\xf0\\x9f": -1.0, "�": -2}
        assert logprobs["top_logprobs"] == [expected]
