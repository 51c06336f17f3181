"""LangChain's ChatOpenAI against the demo model: pictures, streams, calls and forms."""

from __future__ import annotations

import asyncio
import base64
import functools
import operator
from typing import Any, Literal

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
pytest.importorskip("langchain_openai")

import openai
from asked_pictures import QUESTION, SEEDS, about, describes, picture
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@pytest.fixture(scope="module")
def model(demo_server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{demo_server.url}/v1",
        api_key="none",
        model="mllama-demo",
        temperature=0,
        max_retries=0,
        stream_usage=True,
    )


def asked(seed: int = SEEDS[0]) -> HumanMessage:
    return HumanMessage(content=about(seed)[0]["content"])


@pytest.fixture(scope="module")
def answer(model) -> AIMessage:
    return model.invoke([asked()])


def test_a_picture_is_described(model, answer):
    assert describes(answer.text, SEEDS[0])
    assert answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    block = {
        "type": "image",
        "base64": base64.b64encode(picture(SEEDS[0])).decode(),
        "mime_type": "image/png",
    }
    other = HumanMessage(content_blocks=[block, {"type": "text", "text": QUESTION}])
    assert model.invoke([other]).text == answer.text
    system = SystemMessage("You see pictures.")  # which its template takes only without a picture
    assert model.invoke([system, asked()]).usage_metadata["input_tokens"] > usage["input_tokens"]


def test_streams(model, answer):
    chunks = list(model.stream([asked()]))
    whole = functools.reduce(operator.add, chunks)
    assert whole.text == answer.text and len(chunks) > 3
    assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    found = asyncio.run(model.abatch([[asked(seed)] for seed in SEEDS]))
    for seed, message in zip(SEEDS, found):
        assert describes(message.text, seed), message.text


def test_what_is_bound(model, answer):
    found = model.bind(logprobs=True, top_logprobs=2).invoke([asked()])
    content = found.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]
    word = answer.text.split()[3]
    assert model.bind(stop=[word]).invoke([asked()]).text == answer.text.partition(word)[0]
    cut = model.bind(max_tokens=2).invoke([asked()])
    assert cut.response_metadata["finish_reason"] == "length"
    with pytest.raises(openai.BadRequestError, match="top_p"):
        model.bind(top_p=2).invoke([asked()])


class Look(BaseModel):
    """Look at a place."""

    place: Literal["left", "right"]


@pytest.mark.parametrize("choice", ["required", "Look"])
def test_tools(model, choice):
    bound = model.bind_tools([Look], tool_choice=choice, strict=True, parallel_tool_calls=False)
    found = bound.invoke([asked()])
    (call,) = found.tool_calls
    assert call["name"] == "Look" and Look(**call["args"]) and not found.invalid_tool_calls
    streamed: Any = functools.reduce(operator.add, bound.stream([asked()]))
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]
    turns = [asked(), found, ToolMessage("a cross", tool_call_id=call["id"])]
    assert isinstance(model.bind_tools([Look]).bind(max_tokens=20).invoke(turns), AIMessage)


class Shape(BaseModel):
    """A shape of the picture."""

    kind: Literal["circle", "square", "triangle", "cross"]
    is_large: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    bound = model.with_structured_output(Shape, method=method, strict=True, include_raw=True)
    found = bound.invoke([asked()])
    assert isinstance(found["parsed"], Shape) and found["parsing_error"] is None
