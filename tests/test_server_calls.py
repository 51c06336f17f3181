"""Answers that call functions, and answers of a form: read, enforced, refused, streamed, and sent back."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
import openai
from pydantic import BaseModel
from server_helpers import Running, openai_client, served, web

from mllama.demo import checkpoint_path
from mllama.processing.processor import MllamaProcessor
from mllama.server.call_prompts import with_functions, writes_calls
from mllama.server.call_reader import Call, CallReader
from mllama.server.errors import RequestError

CHAT = "/v1/chat/completions"
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "description": "at", "parameters": POINT}}
GO = {"type": "function", "function": {"name": "go"}}
TOOLS = [LOOK, GO]
ONE = '{"name": "look", "parameters": {"x": 1}}'


# Reading


def read(text: str, rng: random.Random | None = None, **options: Any) -> tuple[str, list[Call]]:
    """What comes of a text, in one piece or in random ones."""
    reader = CallReader({"look", "go"}, **options)
    found, calls, at = "", [], 0
    while at < len(text):
        step = rng.randint(1, 9) if rng else len(text)
        piece = reader.feed(text[at : at + step])
        found, calls, at = found + piece.text, [*calls, *piece.calls], at + step
    return found + reader.finish().text, calls


LOOKS = [Call("look", '{"x": 1}')]
GOES = [Call("go", "{}")]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (ONE, LOOKS),
        (f"\n <|python_tag|>{ONE}\n", LOOKS),
        (f"{ONE}; {ONE}", LOOKS * 2),
        (f"{ONE}\n{ONE}{ONE};", LOOKS * 3),
        (f"[{ONE}, {ONE}]", LOOKS * 2),
        ('{"type": "function", "name": "go", "parameters": {}}', GOES),
        ('{"parameters": {}, "name": "go", "id": "7"}', GOES),
        ('{"name": "look", "arguments": {"x":1}}', LOOKS),
        ('{"name": "look", "arguments": "{\\"x\\": 1}"}', LOOKS),
        ('{"name": "go", "parameters": {"a": "}{\\"\\\\"}}', [Call("go", '{"a": "}{\\"\\\\"}')]),
        ('{"name": "go", "parameters": {"a": 1, "a": 2}}', [Call("go", '{"a": 2}')]),
        ('{"name": "go", "parameters": {"a": "\\ud800"}}', [Call("go", '{"a": "\ufffd"}')]),
        (
            '{"name": "go", "parameters": {"a": "\\ud83d\\ude00"}}',
            [Call("go", '{"a": "\U0001f600"}')],
        ),
    ],
)
def test_calls_are_read(text, calls):
    assert read(text) == ("", calls)
    rng = random.Random(len(text))
    for _ in range(20):
        assert read(text, rng) == ("", calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A red circle.",
        "  A red circle.",
        "{",
        "[",
        "<",
        "<|python",
        "<b>bold</b>",
        '{"colour": "red"}',
        "[1, 2]",
        '{"name": "fly", "parameters": {}}',
        '{"name": "go"}',
        '{"name": "go", "parameters": []}',
        '{"name": "go", "parameters": "x"}',
        '{"name": "go", "parameters": {"a": NaN}}',
        '{"name": "go", "parameters": {"a": 1e999}}',
        '{"name": "go", "parameters": {}, "more": 1}',
        '{"name": "go", "parameters": {}, "arguments": {}}',
        '{"name": "go", "type": "x", "parameters": {}}',
        '{"name": "go", "parameters": {"a": ' + "9" * 5000 + "}}",
        "{'name': 'go', 'parameters': {}}",
        ONE[:-1],
        f"Then {ONE}",
        '<|python_tag|>brave_search.call(query="a")',
        "{" * 5000,
        '{"name": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_what_is_no_call_stays_text(text):
    assert read(text) == (text, [])
    rng = random.Random(len(text))
    for _ in range(20 if len(text) < 1000 else 1):
        assert read(text, rng) == (text, [])


def test_text_behind_calls_is_text():
    assert read(f"{ONE} and so on") == (" and so on", LOOKS)
    assert read(f"{ONE}; {ONE[:-4]}") == (f"; {ONE[:-4]}", LOOKS)
    assert read(f"{ONE}; {ONE}", several=False) == ("", LOOKS)


def test_text_is_held_no_longer_than_it_may_be_a_call():
    reader = CallReader({"go"})
    assert reader.feed('{"colour').text == "" and reader.feed('"').text == '{"colour"'
    assert CallReader({"go"}).feed("A").text == "A"
    reader = CallReader({"go"})
    assert reader.feed('{"name": "go", "parameters": {').text == ""
    assert reader.feed("}}").calls == (Call("go", "{}"),)


# Templates

PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
HELLO = {"role": "user", "content": "hello"}


def past(*keys: str | None) -> dict[str, Any]:
    function = {"name": "look", "arguments": {"x": 1}}
    calls = [{"id": key, "type": "function", "function": function} for key in keys]
    return {"role": "assistant", "content": "well", "tool_calls": calls}


def result(key: str | None, text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({"tool_call_id": key} if key else {})


def test_a_template_that_writes_functions_gets_them():
    assert with_functions([HELLO], TOOLS, True) == ((HELLO,), tuple(TOOLS))
    assert writes_calls("{% if 'tool_calls' in message %}") and not writes_calls("{{ tools }}")


@pytest.mark.parametrize("writes", [True, False])
def test_functions_beside_a_picture_stand_in_the_text(writes):
    (message,), tools = with_functions([PICTURE], TOOLS, writes)
    assert tools == () and message["content"][0] == {"type": "image"}
    text = message["content"][1]["text"]
    assert text.startswith("Given the following functions") and text.endswith("}\n\nWhat?")
    assert json.dumps(LOOK, indent=4) in text and '"go"' in text
    assert PICTURE["content"][1]["text"] == "What?"


def test_functions_where_the_template_writes_none():
    (system, message), tools = with_functions(
        [{"role": "system", "content": "s"}, HELLO], [GO], False
    )
    assert tools == () and system["content"] == "s" and message["content"].endswith("\n\nhello")
    assert with_functions([HELLO], [], False) == ((HELLO,), ())
    with pytest.raises(RequestError, match="one of the user"):
        with_functions([{"role": "system", "content": "s"}], [GO], False)


def test_calls_of_the_past_where_the_template_writes_none():
    found, _ = with_functions([HELLO, past("1", "2"), result("1", "a")], [], False)
    assert found[1] == {"role": "assistant", "content": f"well{ONE}; {ONE}"}
    assert read(found[1]["content"].removeprefix("well")) == ("", LOOKS * 2)


def test_several_calls_of_the_past_are_a_turn_each():
    messages = [HELLO, past("1", "2"), result("2", "b"), result("1", "a"), result("3", "c"), HELLO]
    found, _ = with_functions(messages, TOOLS, True)
    assert [m["role"] for m in found[1:]] == "assistant tool assistant tool tool user".split()
    assert [c["id"] for m in found for c in m.get("tool_calls", ())] == ["1", "2"]
    assert [m["content"] for m in found[1:]] == ["well", "a", "", "b", "c", "hello"]
    found, _ = with_functions([past(None, None), result(None, "a"), result(None, "b")], [], True)
    assert [m["content"] for m in found] == ["well", "a", "", "b"]
    found, _ = with_functions([past("1", "2")], [], True)
    assert [m["content"] for m in found] == ["well", ""]


def test_the_demo_models_prompt_tells_the_functions():
    processor = MllamaProcessor.from_pretrained(checkpoint_path())
    messages = [HELLO, past("1"), result("1", "42"), PICTURE]
    found, tools = with_functions(messages, TOOLS, writes_calls(processor.chat_template))
    text = processor.apply_chat_template(list(found), tools=list(tools) or None)
    assert "Respond in the format" in text and ONE in text and "42" in text and "<|image|>" in text


# Through the server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served() as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as found:
        yield found


def asked(words: str, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": words}], **fields}


def streamed(client: openai.OpenAI, body: dict[str, Any]) -> tuple[str, list[Any], str]:
    text, calls, reason = "", {}, None
    for chunk in client.chat.completions.create(**body, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            entry = calls.setdefault(call.index, [call.id, call.function.name, ""])
            entry[2] += call.function.arguments
        reason = choice.finish_reason or reason
    return text, [calls[i] for i in sorted(calls)], reason


def test_calls_of_an_answer(client, server):
    found = client.chat.completions.create(**asked(f"{ONE}; {ONE}", tools=TOOLS)).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    first, second = found.message.tool_calls
    assert first.function.name == "look" and json.loads(first.function.arguments) == {"x": 1}
    assert first.id.startswith("call_") and first.id != second.id
    text, calls, reason = streamed(client, asked(f"{ONE}; {ONE}", tools=TOOLS))
    assert text == "" and reason == "tool_calls" and len({call[0] for call in calls}) == 2
    assert [call[1:] for call in calls] == [["look", '{"x": 1}']] * 2
    work = server.engine.works[-1]
    assert work.constraint is None and [t["function"]["name"] for t in work.tools] == ["look", "go"]
    assert "strict" not in work.tools[0]["function"]


def test_an_answer_beside_functions_is_text(client, server):
    for words in ("A red circle.", '{"colour": 1}', ONE[:-1]):
        body = asked(words, tools=TOOLS)
        found = client.chat.completions.create(**body).choices[0]
        assert found.message.content == words and found.message.tool_calls is None
        assert found.finish_reason == "stop" and streamed(client, body) == (words, [], "stop")
    body = asked(ONE, tools=TOOLS, tool_choice="none")
    assert client.chat.completions.create(**body).choices[0].message.content == ONE
    assert server.engine.works[-1].tools == ()


def test_an_answer_that_ends_inside_a_call_says_so(client):
    text, calls, reason = streamed(client, asked(f"{ONE}; {ONE}", tools=TOOLS, max_tokens=6))
    assert calls[0][1:] == ["look", '{"x": 1}'] and len(calls) == 1
    assert text == '; {"name":' and reason == "length"


def test_log_probabilities_of_calls(client):
    found = client.chat.completions.create(**asked(f"{ONE} a b", tools=TOOLS, logprobs=True))
    (choice,) = found.choices
    assert choice.message.content == " a b" and len(choice.message.tool_calls) == 1
    assert "".join(t.token for t in choice.logprobs.content) == f"{ONE} a b"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"look", "go"}),
        ({"type": "function", "function": {"name": "look"}}, {"look"}),
    ],
)
def test_a_call_is_enforced(client, choice, names):
    body = asked("x", tools=TOOLS, tool_choice=choice, n=8)
    found = client.chat.completions.create(**body)
    seen = set()
    for answer in found.choices:
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        for call in answer.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(
                arguments, POINT if call.function.name == "look" else {"maxProperties": 0}
            )
            seen.add(call.function.name)
    assert seen == names
    _, calls, reason = streamed(client, asked("x", tools=TOOLS, tool_choice=choice))
    assert reason == "tool_calls" and {name for _, name, _ in calls} <= names
    for _, _, arguments in calls:
        json.loads(arguments)


def test_strict_functions_are_enforced_where_they_are_called(client, server):
    strict = {**LOOK, "function": {**LOOK["function"], "strict": True}}
    client.chat.completions.create(**asked("x", tools=[strict, GO]))
    work = server.engine.works[-1]
    assert work.constraint is not None and "strict" not in work.tools[0]["function"]


class Shape(BaseModel):
    """As pydantic writes it, with $defs and titles."""

    kind: str
    corners: list[int]
    inner: Shape | None


def test_an_answer_has_its_form(client):
    found = client.chat.completions.parse(**asked("x"), response_format=Shape).choices[0]
    assert isinstance(found.message.parsed, Shape) and found.finish_reason == "stop"
    body = asked("x", response_format={"type": "json_object"}, n=4)
    for choice in client.chat.completions.create(**body).choices:
        assert isinstance(json.loads(choice.message.content), dict)
    text, _, reason = streamed(client, asked("x", response_format={"type": "json_object"}))
    assert isinstance(json.loads(text), dict) and reason == "stop"
    found = client.completions.create(
        model="echo",
        prompt=["a", "b"],
        extra_body={"response_format": {"type": "json_object"}},
    )
    assert all(isinstance(json.loads(choice.text), dict) for choice in found.choices)


def test_an_answer_that_ends_before_its_form_says_so(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked("x", max_tokens=3), response_format=Shape)
    body = asked("x", max_tokens=3, tools=TOOLS, tool_choice="required")
    found = client.chat.completions.create(**body).choices[0]
    assert found.finish_reason == "length" and found.message.tool_calls is None
    assert found.message.content.startswith("{")


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": form({"not": {}})}, "response_format", "Unimplemented keys"),
        (
            {"response_format": form({"properties": {f"p{i}": {} for i in range(6000)}})},
            "response_format",
            "items|takes more than|at most",
        ),
        ({"tools": [GO, LOOK, bad := {"type": "function", "function": {
            "name": "bad", "parameters": {"type": "objekt"}}}], "tool_choice": "required"},
         "tools[2].function.parameters", "objekt"),
        ({"tools": [GO, bad], "tool_choice": {"type": "function", "function": {"name": "bad"}}},
         "tools[1].function.parameters", "objekt"),
        ({"tools": [bad], "response_format": form({})}, "tools[0].function.parameters", "objekt"),
        ({"response_format": form({}), "min_tokens": 5}, "min_tokens", "ends by its form"),
        ({"response_format": form({}), "ignore_eos": True}, "ignore_eos", "ends by its form"),
        ({"tools": [GO], "tool_choice": "required", "min_tokens": 5}, "min_tokens", "by its form"),
    ],
)  # fmt: skip
def test_what_no_answer_can_be_held_to_is_refused(server, fields, param, words):
    count = len(server.engine.works)
    found = web.post(server.url + CHAT, json=asked("x", **fields))
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == param
    assert any(word in error["message"] for word in words.split("|")), error
    assert len(error["message"]) < 400 and len(server.engine.works) == count
    assert web.post(server.url + CHAT, json=asked("x")).status_code == 200


def test_a_schema_of_a_function_that_need_not_be_called_is_not_compiled(client):
    bad = {"type": "function", "function": {"name": "look", "parameters": {"type": "objekt"}}}
    found = client.chat.completions.create(**asked(ONE, tools=[bad])).choices[0]
    assert len(found.message.tool_calls) == 1


def test_calls_and_their_results_are_sent_back(client, server):
    first = client.chat.completions.create(**asked(f"{ONE}; {ONE}", tools=TOOLS)).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": str(i)}
        for i, call in enumerate(first.tool_calls)
    ]
    messages = [{"role": "user", "content": "x"}, first.to_dict(), *results]
    client.chat.completions.create(model="echo", messages=messages, tools=TOOLS)
    written = server.engine.works[-1].messages
    assert [m["role"] for m in written] == "user assistant tool assistant tool".split()
    assert [m["content"] for m in written] == ["x", "", "0", "", "1"]
    assert written[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_functions_for_a_template_without_them():
    with served(template_writes_calls=False) as other:
        body = asked("hi", tools=TOOLS)
        assert web.post(other.url + CHAT, json=body).status_code == 200
        (work,) = other.engine.works
        assert work.tools == () and "Given the following functions" in work.messages[0]["content"]
