"""Bodies of requests: every parameter with its bounds, what is refused by name, and the messages' form."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")

from mllama.server.errors import RequestError
from mllama.server.fields import read
from mllama.server.messages import template_messages
from mllama.server.schema import (
    REFUSED,
    WITHOUT_EFFECT,
    ChatRequest,
    CompletionRequest,
    unknown_fields,
)

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "look"}}
NAMED = {"type": "function", "function": {"name": "look"}}
PICTURE = "data:image/png;base64,AAAA"


def chat(**fields: Any) -> ChatRequest:
    return read(ChatRequest, {"messages": HELLO, **fields})


def refusal(model: type = ChatRequest, **fields: Any) -> RequestError:
    body = {"messages": HELLO, "prompt": "hello", **fields}
    with pytest.raises(RequestError) as caught:
        read(model, body)
    error = caught.value
    assert error.status == 400 and len(error.message) < 400
    for word in ("pydantic", "Traceback", "class '", "object at 0x", "Input should", "None", "'"):
        assert word not in error.message, error.message
    return error


# name, values at the bounds and inside, values beyond them or of another kind
NUMBERS = [
    ("max_tokens", [1, 16.0, 10**9], [0, -1, 1.5, 2**31]),
    ("max_completion_tokens", [1], [0, 2.5]),
    ("min_tokens", [0, 5], [-1, 0.5]),
    ("temperature", [0, 0.7, 2], [-0.001, 2.001]),
    ("top_p", [0.001, 1], [0, 1.001]),
    ("top_k", [-1, 0, 1, 50], [-2, 1.5]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("seed", [0, -5, 2**63 - 1, -(2**63)], [2**63, 0.5]),
    ("n", [1, 8], [0, 9]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.1, 1, 10], [0, -1, 11]),
]


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(("name", "good", "bad"), NUMBERS)
def test_numbers_have_bounds_and_are_not_converted(model, name, good, bad):
    if name not in model.model_fields:
        return
    for value in [*good, None]:
        read(model, {"messages": HELLO, "prompt": "hello", name: value})
    for value in [*bad, True, "1", [1], {}, 10**400, -(10**400)]:
        error = refusal(model, **{name: value})
        assert error.param == name and error.message.startswith(f"{name} must be ")
        assert ", got " in error.message


def test_numbers_beyond_float_are_refused_in_words():
    assert refusal(temperature=float("inf")).param == "temperature"
    assert refusal(temperature=float("nan")).param == "temperature"


@pytest.mark.parametrize("name", ["stream", "logprobs", "ignore_eos", "parallel_tool_calls"])
def test_flags_are_true_or_false(name):
    for value in (True, False, None):
        chat(**{name: value})
    for value in (1, 0, "true", []):
        assert f"{name} must be true or false" in refusal(**{name: value}).message


def test_stop():
    assert chat(stop="x").stop == ["x"] and chat(stop=None).stop is None
    assert chat(stop=["x"] * 16).stop == ["x"] * 16
    for value in (["x"] * 17, [""], "", ["x" * 1001], [1], 1, {}):
        assert refusal(stop=value).message.startswith("stop")


def test_stop_token_ids():
    assert chat(stop_token_ids=[1, 2]).stop_token_ids == [1, 2]
    for value in ([-1], [2**31], [True], ["1"], list(range(65)), 5):
        assert refusal(stop_token_ids=value).message.startswith("stop_token_ids")


def test_logit_bias():
    most = {str(i): 1 for i in range(300)}
    assert chat(logit_bias={"5": -100, "6": 100.0}).logit_bias == {"5": -100.0, "6": 100.0}
    chat(logit_bias=most)
    for value in ({**most, "300": 1}, {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "2"}, {"1": True}):
        assert refusal(logit_bias=value).message.startswith("logit_bias")
    for value in ({"1": 1, "01": 2}, {"\u0661": 1}, [1], {"1" * 500: 1}, {"x" * 500: True}):
        assert refusal(logit_bias=value).message.startswith("logit_bias")


def test_limits_of_an_answer_agree():
    assert chat(max_tokens=5, max_completion_tokens=5).longest == 5
    assert chat(max_completion_tokens=7).longest == chat(max_tokens=7).longest == 7
    error = refusal(max_tokens=5, max_completion_tokens=6)
    assert "5" in error.message and "6" in error.message and error.param == "max_tokens"
    assert refusal(max_completion_tokens=5, min_tokens=6).param == "min_tokens"


@pytest.mark.parametrize("least", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_a_call_of_a_strict_function_ends_where_its_form_does(least):
    function = {"name": "look", "parameters": {"type": "object"}, "strict": True}
    tools = [{"type": "function", "function": function}]
    error = refusal(tools=tools, **least)
    assert "a strict function" in error.message and error.param in least
    assert chat(tools=tools, tool_choice="none", **least).tools
    del function["strict"]
    assert chat(tools=tools, **least).tools


def test_log_probabilities():
    assert chat(logprobs=True, top_logprobs=20).top_logprobs == 20
    for fields in ({"top_logprobs": 3}, {"logprobs": False, "top_logprobs": 0}):
        assert "expected logprobs to be true" in refusal(**fields).message
    for value in (-1, 21):
        assert refusal(logprobs=True, top_logprobs=value).param == "top_logprobs"
    assert read(CompletionRequest, {"prompt": "a", "logprobs": 20}).logprobs == 20
    for value in (21, -1, True):
        assert refusal(CompletionRequest, logprobs=value).param == "logprobs"


def test_stream_options():
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage
    assert not chat(stream=True).wants_usage
    assert "without stream" in refusal(stream_options={"include_usage": True}).message
    assert refusal(stream=True, stream_options={"include_usage": 1}).param == (
        "stream_options.include_usage"
    )


def test_response_format():
    schema = {"name": "a", "schema": {"type": "object"}}
    chat(response_format={"type": "text"})
    chat(response_format={"type": "json_object"})
    found = chat(response_format={"type": "json_schema", "json_schema": schema}).response_format
    assert found.json_schema.schema_ == {"type": "object"}
    for value, words in [
        ({"type": "xml"}, "text, json_object or json_schema"),
        ({}, "response_format.type is missing"),
        ({"type": "json_schema"}, "json_schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "schema is missing"),
        ({"type": "json_schema", "json_schema": {**schema, "schema": 5}}, "must be an object"),
        ({"type": "json_schema", "json_schema": {**schema, "name": "a b"}}, '"a b"'),
        ("json", "an object with type"),
    ]:
        assert words in refusal(response_format=value).message


def test_tools():
    for choice in ("none", "auto", "required", NAMED):
        chat(tools=[TOOL], tool_choice=choice)
    for fields, words in [
        ({"tools": [TOOL], "tool_choice": "any"}, "none, auto, required"),
        ({"tools": [TOOL], "tool_choice": 1}, "none, auto, required"),
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": [TOOL], "tool_choice": {**NAMED, "function": {"name": "x"}}}, "names "),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type must be function"),
        ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, '"a b"'),
        ({"tools": [{**TOOL, "function": {"name": "a", "parameters": []}}]}, "JSON schema"),
        ({"tools": [TOOL] * 129}, "at most 128"),
        (
            {
                "tools": [TOOL],
                "tool_choice": NAMED,
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
    ]:
        assert words in refusal(**fields).message


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_an_answer_is_refused_by_name(name):
    error = refusal(**{name: {"a": 1}})
    assert error.param == name and error.message.startswith(f"{name} is not taken, got an object")
    neutral, _ = REFUSED[name]
    for value in [*neutral, None]:
        chat(**{name: value})
    if True not in neutral:
        assert refusal(**{name: True}).param == name  # which equals 1


def test_what_has_no_effect_and_what_is_unknown_is_left_out():
    body = {"messages": HELLO, **{name: {"a": 1} for name in WITHOUT_EFFECT}, "flavour": 1}
    assert read(ChatRequest, body) == chat()
    assert unknown_fields(ChatRequest, body) == ["flavour"]


# Messages


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "1 to 4096"),
        ("hi", "1 to 4096"),
        ([3], "messages[0] is 3"),
        ([{"content": "a"}], "messages[0].role is missing"),
        ([{"role": "robot", "content": "a"}], "system, developer, user, assistant or tool"),
        ([{"role": "user"}], "messages[0]: content is missing"),
        ([{"role": "assistant"}], "content is missing"),
        ([*HELLO, {"role": "user", "content": 5}], "messages[1].content must be"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0] is"),
        ([{"role": "user", "content": [{"text": "a"}]}], "content[0].type is missing"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a string under text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "needs an address"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}], "address"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], "data: URL"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "type input_audio"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "type video_url"),
        ([{"role": "user", "content": [{"type": "x" * 999}]}], "text or image_url"),
        ([{"role": "user", "content": [{"type": "image"}]}], 'text or image_url, got "image"'),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "tool_calls[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}], "at most 1024"),
    ],
)
def test_messages_that_are_none(messages, words):
    assert words in refusal(messages=messages).message


def picture(url: Any = PICTURE) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def written(*messages: dict[str, Any], system: str = "fold") -> tuple[list[Any], list[Any]]:
    parsed = read(ChatRequest, {"messages": list(messages)}).messages
    found, links = template_messages(parsed, system)
    return list(found), links


def test_pictures_keep_the_order_of_their_parts_in_all_turns():
    found, links = written(
        {"role": "user", "content": [text("a"), picture({"url": "one", "detail": "high"})]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [picture("two"), picture("three"), text("c")]},
    )
    assert [link for _, link in links] == ["one", "two", "three"]
    assert links[2][0] == "messages[2].content[1]"
    assert found[2]["content"] == [{"type": "image"}, {"type": "image"}, text("c")]


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_a_picture_stands_in_a_message_of_the_user(role):
    with pytest.raises(RequestError, match="one of the user") as caught:
        written({"role": role, "content": [text("a"), picture()]})
    assert caught.value.param == "messages[0].content[1]"


def test_system_text_beside_pictures():
    system = {"role": "developer", "content": "Be short."}
    asked = {"role": "user", "content": [picture(), text("What?")]}
    found, _ = written(system, asked)
    assert found == [{"role": "user", "content": [{"type": "image"}, text("Be short.\n\nWhat?")]}]
    found, _ = written(system, HELLO[0], asked)
    assert found[0] == {"role": "user", "content": "Be short.\n\nhello"}
    found, _ = written(system, {"role": "user", "content": [picture()]})
    assert found == [{"role": "user", "content": [{"type": "image"}, text("Be short.")]}]
    found, _ = written({"role": "system", "content": " "}, asked)
    assert found == [{"role": "user", "content": [{"type": "image"}, text("What?")]}]
    found, _ = written(system, asked, system="error")
    assert found[0] == {"role": "system", "content": "Be short."}
    found, _ = written(system, *HELLO)
    assert found[0] == {"role": "system", "content": "Be short."}


def test_calls_of_the_past():
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": [text("42")]},
    ]
    found, _ = written(*turns)
    assert found[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"a": 1}}
    assert found[2] == {"role": "tool", "content": "42", "tool_call_id": "1"}
    assert "reasoning_content" not in found[1]
    for arguments in ("[1]", "{", "[" * 100_000, "{'a': 1}"):
        turns[1]["tool_calls"] = [{**call, "function": {"name": "a", "arguments": arguments}}]
        error = refusal(messages=turns) if "'" not in arguments else None
        assert error is None or "JSON object" in error.message


# Prompts


def test_prompts():
    for value, expected in [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ]:
        assert read(CompletionRequest, {"prompt": value}).prompt == expected
    for value in ([], "", [""], [[]], [1, "a"], ["a", [1]], [-1], [True], [1.5], 3, {}, ["a"] * 17):
        assert refusal(CompletionRequest, prompt=value).param == "prompt"
    with pytest.raises(RequestError, match="prompt is missing"):
        read(CompletionRequest, {})
