"""OpenAI's client for Python against the demo model: answers, streams, forms, calls, and their ends."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")
pytest.importorskip("openai")

import jsonschema
import openai
from asked_pictures import MODEL, QUESTION, SEEDS, about, describes
from pydantic import BaseModel, Field
from server_helpers import eventually, openai_client


@pytest.fixture(scope="module")
def client(demo_server) -> Iterator[Any]:
    """Refuses what does not have the form of OpenAI's answers."""
    with openai_client(demo_server.url) as found:
        yield found


def asked(picture: int = SEEDS[0], **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": about(picture), "temperature": 0, **options}


@pytest.fixture(scope="module")
def description(client) -> str:
    """The answer about the first picture."""
    return client.chat.completions.create(**asked()).choices[0].message.content


def texts(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


# Answers


def test_a_picture_is_described(client):
    found = client.chat.completions.create(**asked())
    (choice,) = found.choices
    assert describes(choice.message.content, SEEDS[0]) and choice.finish_reason == "stop"
    usage = found.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    words = client.chat.completions.create(
        **asked(messages=[{"role": "user", "content": QUESTION}])
    )
    assert words.usage.prompt_tokens == usage.prompt_tokens - 1  # one for the picture


def test_pictures_are_described_at_once(demo_server):
    async def one(client: Any, seed: int) -> str:
        stream = await client.chat.completions.create(**asked(seed), stream=True)
        return texts([chunk async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{demo_server.url}/v1", api_key="none", _strict_response_validation=True
        ) as client:
            return await asyncio.gather(*[one(client, seed) for seed in SEEDS])

    for seed, text in zip(SEEDS, asyncio.run(all_of_them())):
        assert describes(text, seed), text


def test_a_prompt_that_was_read_before_is_not_read_again(client, description):
    turns = [
        *about(SEEDS[0]),
        {"role": "assistant", "content": description},
        {"role": "user", "content": "How many shapes are there? " * 10},
    ]
    found = client.chat.completions.create(**asked(messages=turns))
    again = client.chat.completions.create(**asked(messages=turns))
    usage = again.usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert again.choices[0].message.content == found.choices[0].message.content


def test_raw_responses(client, description):
    raw = client.chat.completions.with_raw_response.create(**asked())
    assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == description
    with client.chat.completions.with_streaming_response.create(**asked(stream=True)) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_a_stream_says_what_an_answer_says(client, description):
    options = {"stream_options": {"include_usage": True}}
    with client.chat.completions.stream(**asked(), **options) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(e.delta for e in events if e.type == "content.delta") == description
    assert final.choices[0].message.content == description
    assert final.choices[0].finish_reason == "stop" and final.usage.completion_tokens > 0


def test_log_probabilities(client, description):
    found = client.chat.completions.create(**asked(logprobs=True, top_logprobs=3))
    content = found.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode().startswith(description)
    assert len(content) == found.usage.completion_tokens
    for token in content:
        first, *others = token.top_logprobs
        assert (first.token, first.logprob) == (token.token, token.logprob)  # it is greedy
        assert all(other.logprob <= first.logprob for other in others) and len(others) == 2
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1 + 1e-5
    stream = client.chat.completions.create(**asked(logprobs=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in stream]
    streamed = [token for part in parts if part for token in part.content]
    assert [t.token for t in streamed] == [t.token for t in content]


def test_several_answers_have_seeds_of_their_own(client):
    options = {"n": 3, "seed": 5, "temperature": 2, "max_tokens": 12}
    first, again = (client.chat.completions.create(**asked(**options)) for _ in range(2))
    said = [choice.message.content for choice in first.choices]
    assert said == [choice.message.content for choice in again.choices] and len(set(said)) > 1
    parts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked(**options), stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert parts == said


def test_an_answer_ends_before_a_stop_string(client, description):
    word = description.split()[3]
    for stop in (word, ["never said", word]):
        found = client.chat.completions.create(**asked(stop=stop)).choices[0]
        assert found.message.content == description.partition(word)[0]
        assert found.finish_reason == "stop"
        stream = client.chat.completions.create(**asked(stop=stop, stream=True))
        assert texts(stream) == found.message.content


def test_an_answer_ends_by_its_length(client):
    for name in ("max_tokens", "max_completion_tokens"):
        found = client.chat.completions.create(**asked(**{name: 2}))
        assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 2


def test_completions(client, demo_server):
    found = client.completions.create(model=MODEL, prompt=["a large", "a"], max_tokens=3)
    assert [choice.index for choice in found.choices] == [0, 1]
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none") as lax:
        # Which takes a reason of null in a stream, as OpenAI's own server sends it.
        stream = lax.completions.create(model=MODEL, prompt="a large", max_tokens=3, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == found.choices[0].text


# Forms and calls


class Shape(BaseModel):
    """One of the picture."""

    kind: Literal["circle", "square", "triangle", "cross"]
    is_large: bool


class Shapes(BaseModel):
    """Some of them."""

    shapes: list[Shape] = Field(max_length=3)


def test_an_answer_is_parsed(client):
    found = client.chat.completions.parse(**asked(), response_format=Shapes).choices[0]
    assert isinstance(found.message.parsed, Shapes) and found.finish_reason == "stop"
    with client.chat.completions.stream(**asked(), response_format=Shapes) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == found.message.parsed
    schema = {"enum": ["yes", "no"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    found = client.chat.completions.create(**asked(response_format=form)).choices[0]
    assert found.message.content in ('"yes"', '"no"')


def test_a_form_that_is_cut_says_so(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked(max_tokens=2), response_format=Shapes)


class Look(BaseModel):
    """Look at a place."""

    place: Literal["left", "right"]


def test_calls_are_parsed_and_their_results_sent_back(client):
    tools = [openai.pydantic_function_tool(Look)]
    options = {"tools": tools, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "Look"}}):
        found = client.chat.completions.parse(**asked(**options, tool_choice=choice)).choices[0]
        assert found.finish_reason == "tool_calls" and found.message.content is None
        (call,) = found.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Look)
    with client.chat.completions.stream(**asked(**options, tool_choice="required")) as stream:
        (done,) = (e for e in stream if e.type == "tool_calls.function.arguments.done")
        assert done.name == "Look" and done.parsed_arguments == call.function.parsed_arguments
    turns = [
        *about(SEEDS[0]),
        found.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "a cross"},
    ]
    answer = client.chat.completions.create(**asked(messages=turns, tools=tools, max_tokens=20))
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_several_calls_are_valid_each(client):
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    options = {"tools": [tool], "tool_choice": "required", "max_tokens": 60, "temperature": 1}
    found = client.chat.completions.create(**asked(**options, n=4, seed=1))
    calls = [call for choice in found.choices for call in choice.message.tool_calls or ()]
    assert calls and len({call.id for call in calls}) == len(calls)
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), schema)


# Refusals and ends


def test_refusals_are_the_clients_own_errors(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**asked(model="other"))
    assert caught.value.code == "model_not_found" and MODEL in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked(temperature=3))
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked(messages=[{"role": "user", "content": parts}]))
    assert caught.value.param == "messages[0].content[0]"
    for ask in (client.responses.create, client.embeddings.create):
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            ask(model=MODEL, input="a")


def is_idle(server: Any) -> bool:
    found = server.metrics()
    return found["answers_running"] == found["requests_open"] == 0


def test_a_stream_that_is_left_ends(client, demo_server):
    endless = asked(stream=True, extra_body={"ignore_eos": True})
    stream = client.chat.completions.create(**endless)
    assert next(stream) and next(stream) and demo_server.metrics()["requests_open"] == 1
    stream.close()
    eventually(lambda: is_idle(demo_server))
    assert demo_server.metrics()["pages_used"] == 0


def test_a_task_that_is_cancelled_ends_its_answer(demo_server):
    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0
        ) as client:
            endless = asked(extra_body={"ignore_eos": True})
            task = asyncio.ensure_future(client.chat.completions.create(**endless))
            while not (await asyncio.to_thread(demo_server.metrics))["answers_running"]:
                assert not task.done()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    asyncio.run(run())
    eventually(lambda: is_idle(demo_server))
