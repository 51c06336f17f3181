"""Grammars of answers: what a random walk through the allowed tokens writes is of the form."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
from grammar_helpers import ENDS, SIZE, allowed, demo_compiler, walk

from mllama.demo import checkpoint_path
from mllama.grammar import compiling
from mllama.grammar.compiling import Constraint, GrammarCompiler
from mllama.grammar.forms import Calls, Function, GrammarError, grammar_of
from mllama.grammar.vocabulary import Vocabulary
from mllama.processing.tokenizer import MllamaTokenizer

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"$ref": "#/$defs/name"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 6}},
}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {},
    POINT,
    {"type": "array", "items": {"enum": ["red", 5, None, 'a"b']}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "integer", "minimum": -3, "maximum": 120}, {"type": "boolean"}]},
    {"type": "string", "pattern": "^[a-c]{2,4}(-[0-9]+)?$"},
    {"type": "string", "format": "date"},
    {"type": "number", "multipleOf": 0.5, "exclusiveMinimum": 0, "maximum": 9},
    {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["a"]}], "type": "object"},
    {
        "type": "object",
        "properties": {
            "n": {"const": "tree"},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["n", "next"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "patternProperties": {"^p[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> MllamaTokenizer:
    return MllamaTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return demo_compiler()


def written(constraint: Constraint, tokenizer: MllamaTokenizer, rng: random.Random) -> str:
    return tokenizer.decode(list(walk(constraint, tokenizer, rng)))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_what_is_allowed_is_valid(schema, compiler, tokenizer, request):
    rng = random.Random(request.config.getoption("--seed", default=0))
    constraint = compiler.compile(grammar_of(schema, None))
    for _ in range(15):
        value = json.loads(written(constraint.fork(), tokenizer, rng), strict=True)
        jsonschema.validate(value, schema)


@pytest.mark.parametrize("several", [True, False])
def test_calls_are_valid(several, compiler, tokenizer):
    functions = (Function("look", POINT), Function('a-"b', {}), Function("go"))
    constraint = compiler.compile(grammar_of(None, Calls(functions, several=several)))
    rng, names = random.Random(3), set()
    for _ in range(20):
        text = written(constraint.fork(), tokenizer, rng)
        call, end = json.JSONDecoder().raw_decode(text)
        assert set(call) == {"name", "parameters"} and isinstance(call["parameters"], dict)
        assert several or end == len(text)
        assert call["name"] != "go" or call["parameters"] == {}
        if call["name"] == "look":
            jsonschema.validate(call["parameters"], POINT)
        names.add(call["name"])
    assert names == {"look", 'a-"b', "go"}


def test_several_calls_stand_behind_each_other(compiler, tokenizer):
    one = '{"name": "go", "parameters": {}}'
    for several in (True, False):
        constraint = compiler.compile(grammar_of(None, Calls((Function("go"),), several=several)))
        for token in tokenizer.encode(one, add_special_tokens=False):
            constraint.accept(token)
        assert constraint.is_complete is not several
        (next_one,) = tokenizer.encode(";", add_special_tokens=False)
        assert (next_one in allowed(constraint)) is several


def test_an_answer_may_be_a_value_or_a_call(compiler, tokenizer):
    colour = {"type": "object", "properties": {"c": {"const": "red"}}, "required": ["c"]}
    colour["additionalProperties"] = False
    calls = Calls((Function("go"),), required=False)
    constraint = compiler.compile(grammar_of(colour, calls))
    rng = random.Random(1)
    found = {
        tuple(json.loads(written(constraint.fork(), tokenizer, rng).split("; ")[0]))
        for _ in range(30)
    }
    assert found == {("c",), ("name", "parameters")}


def test_calls_that_are_not_required_leave_other_text(compiler, tokenizer):
    constraint = compiler.compile(grammar_of(None, Calls((Function("go"),), required=False)))
    free = constraint.fork()
    for token in tokenizer.encode('The {"name" is', add_special_tokens=False):
        assert token in allowed(free)
        free.accept(token)
    assert set(ENDS) <= set(allowed(free))
    for token in tokenizer.encode('{"', add_special_tokens=False):
        constraint.accept(token)
    assert not set(ENDS) & set(allowed(constraint))
    with pytest.raises(RuntimeError, match="grammar"):
        constraint.accept(tokenizer.encode("x", add_special_tokens=False)[0])


def test_special_tokens_only_end_an_answer(compiler, tokenizer):
    constraint = compiler.compile(grammar_of({"type": "string"}, None))
    assert not [t for t in allowed(constraint) if t >= 438]
    for token in tokenizer.encode(
        '"a<|eot_id|>"', add_special_tokens=False, split_special_tokens=True
    ):
        assert token < 438 and token in allowed(constraint)
        constraint.accept(token)
    assert allowed(constraint) == list(ENDS) and constraint.is_complete


def test_the_mask_has_the_place_of_every_token(compiler):
    constraint = compiler.compile(grammar_of({}, None))
    for row in (
        np.zeros(14, np.int32),
        np.zeros(16, np.int32),
        np.zeros(15, np.int64),
        np.zeros(30, np.int32)[::2],
    ):
        with pytest.raises(ValueError, match="15 contiguous int32"):
            constraint.fill(row)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"type": "string", "pattern": "(" * 50}, "unclosed group"),
        ({"enum": []}, "empty"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"minProperties": 2}}}, "minProperties is 2"),
        ({"properties": {f"p{i}": {"type": "string"} for i in range(800)}}, "3207 items"),
        ({"enum": ["x" * 60_000, "y" * 60_000]}, "at most 120000"),
        (nested(60), "more than 40 levels"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_that_no_answer_can_be_held_to(schema, words, compiler):
    with pytest.raises(GrammarError, match=words.replace("[", r"\[")) as caught:
        compiler.compile(grammar_of(schema, None))
    text = str(caught.value)
    assert len(text) < 300 and "x-guidance" not in text and "|" not in text, text
    assert caught.value.function is None


def test_the_function_at_fault_is_named(compiler):
    functions = [Function("a", POINT), Function("b", {"properties": {"x": {"not": {}}}})]
    with pytest.raises(GrammarError) as caught:
        compiler.compile(grammar_of(None, Calls(tuple(functions))))
    assert caught.value.function == 1
    with pytest.raises(GrammarError) as caught:
        grammar_of(None, Calls((Function("a", nested(50)),)))
    assert caught.value.function == 0


def test_a_poisoned_schema_ends_in_time_and_harms_nobody(tokenizer):
    """Patterns that all hold at once take longer than anybody waits; others are compiled meanwhile."""
    compiler = GrammarCompiler(lambda: Vocabulary(tokenizer, SIZE, ENDS), seconds=10.0)
    compiler.compile(grammar_of({"type": "object"}, None))
    schemas = [
        {"properties": {f"p{i}": {"type": "string", "pattern": f"a{{{j},}}"} for i in range(60)}}
        for j in range(40)
    ]
    poison = grammar_of({"allOf": schemas}, None)
    found: list[BaseException] = []

    def poisoned() -> None:
        try:
            compiler.compile(poison)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=poisoned)
    thread.start()
    compiler.compile(grammar_of(POINT, None))
    assert thread.is_alive()
    thread.join()
    assert isinstance(found[0], GrammarError)  # for its time, or for what it has grown to before
    compiler.compile(grammar_of({"type": "object"}, None))
    hurried = GrammarCompiler(lambda: Vocabulary(tokenizer, SIZE, ENDS), seconds=0.5)
    with pytest.raises(GrammarError, match=r"more than 0\.5 s"):
        hurried.compile(poison)


def test_a_grammar_is_compiled_once(compiler, monkeypatch):
    grammar = grammar_of({"const": "once"}, None)
    first = compiler.compile(grammar)
    first.accept(allowed(first)[0])
    monkeypatch.setattr(compiler, "_compiled", None)
    second = compiler.compile(grammar)
    with pytest.raises(TypeError):
        compiler.compile(grammar_of({"const": "twice"}, None))
    assert allowed(second) == allowed(compiler.compile(grammar)) != allowed(first)


def test_few_grammars_are_kept(tokenizer, monkeypatch):
    monkeypatch.setattr(compiling, "_KEPT", 2)
    compiler = GrammarCompiler(lambda: Vocabulary(tokenizer, SIZE, ENDS), seconds=20.0)
    for i in range(4):
        compiler.compile(grammar_of({"const": i}, None))
    assert len(compiler._kept) == 2


def test_tokens_as_bytes(tokenizer):
    found = Vocabulary(tokenizer, SIZE, ENDS)
    assert len(found.tokens) == SIZE and found.special_token_ids == list(range(438, SIZE))
    text = "naïve \U0001f600\n\t <|eot_id|> {}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(found.tokens[i] for i in ids) == text.encode()
    assert found(text.encode()) == found(text) == ids
    wide = Vocabulary(tokenizer, SIZE + 70, ENDS)
    assert wide.tokens[450] == b"<|image|>" and set(wide.tokens[451:]) == {b""}
    with pytest.raises(ValueError, match="ends an answer"):
        Vocabulary(tokenizer, SIZE, (450,))


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    compiler = GrammarCompiler(lambda: Vocabulary(MllamaTokenizer(words, {}), 2, (1,)))
    for use in (compiler.prepare, lambda: compiler.compile(grammar_of({}, None))):
        with pytest.raises(GrammarError, match="no form: the tokenizer is not byte-level"):
            use()
