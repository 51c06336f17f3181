"""Answers that are held to a form by the engine: the demo model, whatever it would rather say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
from engine_helpers import engine_of
from grammar_helpers import demo_compiler

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.demo import checkpoint_path
from mllama.engine.engine import Engine
from mllama.engine.interface import Options, Piece
from mllama.grammar.forms import Calls, Function, grammar_of
from mllama.server.protocol import Work
from mllama.server.serving import AsyncEngine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue", "yellow"]},
        "places": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["colour", "places"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    folder = checkpoint_path()
    model = MllamaForConditionalGeneration.from_pretrained(folder, device="cpu")
    processor = MllamaProcessor.from_pretrained(folder)
    with engine_of(model, processor, max_batch_size=4, max_length=512) as made:
        yield made


@pytest.fixture(scope="module")
def compiler() -> Any:
    return demo_compiler()


def work(key: str, words: str, grammar: str | None, compiler: Any, **options: Any) -> Work:
    constraint = None if grammar is None else compiler.compile(grammar)
    return Work(
        key,
        Options(max_tokens=300, **options),
        messages=({"role": "user", "content": words},),
        constraint=constraint,
    )


def answers(engine: Engine, works: list[Work]) -> list[list[tuple[str, str | None]]]:
    async def one(asked: AsyncEngine, given: Work) -> list[tuple[str, str | None]]:
        found: dict[int, list[Piece]] = {}
        async for piece in await asked.submit(given):
            found.setdefault(piece.index, []).append(piece)
        return [
            ("".join(p.text for p in pieces), pieces[-1].finish_reason)
            for _, pieces in sorted(found.items())
        ]

    async def all_of_them() -> list[Any]:
        asked = AsyncEngine(engine)
        try:
            return await asyncio.gather(*[one(asked, given) for given in works])
        finally:
            asked.close()

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_have_their_form(engine, compiler, temperature):
    grammar = grammar_of(SCHEMA, None)
    works = [
        work(
            f"{temperature}-{i}",
            "What do you see?",
            grammar,
            compiler,
            temperature=temperature,
            n=2,
            seed=i,
        )
        for i in range(3)
    ]
    for pair in answers(engine, works):
        for text, reason in pair:
            assert reason in ("stop", "length")
            if reason == "stop":
                jsonschema.validate(json.loads(text), SCHEMA)
            else:
                assert text.startswith("{")


def test_calls_are_made(engine, compiler):
    calls = Calls((Function("look", SCHEMA), Function("go")))
    (((text, reason),),) = answers(
        engine, [work("call", "Look.", grammar_of(None, calls), compiler, temperature=0.0)]
    )
    assert reason in ("stop", "length") and text.startswith('{"name": "')


def test_free_answers_beside_them_are_as_they_were(engine, compiler):
    alone = answers(engine, [work("a", "What do you see?", None, compiler, temperature=0.0)])
    together = answers(
        engine,
        [
            work("b", "What do you see?", None, compiler, temperature=0.0),
            work("c", "What do you see?", grammar_of(SCHEMA, None), compiler, temperature=0.0),
        ],
    )
    assert together[0] == alone[0] and together[1] != together[0]
