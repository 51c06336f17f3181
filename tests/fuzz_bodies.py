"""Bodies of requests that a server takes, and what becomes of one when something in it is changed."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from server_helpers import PNG

from mllama.server.schema import REFUSED, ChatRequest, CompletionRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_PICTURE = "data:image/png;base64," + base64.b64encode(PNG).decode()
_FORM = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}, "s": {"type": "array", "items": {"const": "a"}}},
    "required": ["n"],
}
_TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "at", "parameters": _FORM}},
    {"type": "function", "function": {"name": "go"}},
]
_TURNS = [
    {"role": "system", "content": "You see pictures."},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": _PICTURE, "detail": "low"}},
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": _PICTURE},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"n": 1}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "a cross"},
    {"role": "user", "content": "And where?", "name": "Ada"},
]
_HELLO = [{"role": "user", "content": "Hello."}]
_SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100, "6": 2.5},
    "stop": ["###", "\n\n"],
    "stop_token_ids": [7],
    "n": 2,
}

# Each is answered with 200; all are short.
TAKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, {"messages": _TURNS, "max_tokens": 3}),
    (CHAT, {"messages": _TURNS, "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": _HELLO, "max_tokens": 2, "min_tokens": 1, **_SAMPLING}),
    (CHAT, {"messages": _HELLO, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}),
    (CHAT, {"messages": _HELLO, "tools": _TOOLS, "tool_choice": "auto", "stream": True}),
    (CHAT, {"messages": _HELLO, "tools": _TOOLS, "tool_choice": "required"}),
    (
        CHAT,
        {
            "messages": _HELLO,
            "tools": _TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            "parallel_tool_calls": False,
        },
    ),
    (CHAT, {"messages": _HELLO, "response_format": {"type": "json_object"}}),
    (
        CHAT,
        {
            "messages": _HELLO,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "form", "strict": True, "schema": _FORM},
            },
            "stream": True,
        },
    ),
    (TEXT, {"prompt": "a large", "max_tokens": 2, "logprobs": 2, **_SAMPLING}),
    (TEXT, {"prompt": ["a", "a small"], "stream": True, "user": "me", "metadata": {"a": "b"}}),
    (TEXT, {"prompt": [[5, 6], [7]], "max_tokens": 1, "model": "mllama-demo"}),
)


def _nested(levels: int) -> Any:
    value: Any = 1
    for i in range(levels):
        value = {"a": value} if i % 2 else [value]
    return value


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**63)),
    *(10**400, "", " ", "a", "1", "\0", "\ud800", "\U0001f600", "<|eot_id|><|image|>", "null"),
    *("x" * 100_000, "{{ 7 * 7 }}{% for a in b %}", "/etc/passwd", "file:///etc/passwd"),
    *("http://127.0.0.1:1/a.png", "data:image/png;base64,", "data:image/svg+xml;base64,AAAA"),
    *("data:text/html;base64,AAAA", "data:image/png;base64,%%%", "[" * 100),
    *([], {}, [[]], [None], {"": None}, {"type": "object"}, {"$ref": "#"}, {"pattern": "(a+)+$"}),
    *(_nested(40), _nested(100), list(range(5000)), {str(i): i for i in range(400)}),
)
_FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *REFUSED, "flavour"})


def changed(rng: random.Random) -> tuple[str, bytes]:
    """A route, and what is sent to it: one of the bodies, with one to three changes."""
    route, body = copy.deepcopy(rng.choice(TAKEN))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        body = _change(body, rng)
    data = json.dumps(body).encode()
    return route, _change_bytes(data, rng) if rng.random() < 0.15 else data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry in it, as what holds it and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, (dict, list)) else ():
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_VALUES))


def _change(body: Any, rng: random.Random) -> Any:
    places = list(_places(body)) if isinstance(body, (dict, list)) else []
    if not places or rng.random() < 0.02:
        return _value(rng)
    holder, key = rng.choice(places)
    action = rng.choice(("value", "value", "value", "other", "drop", "name", "add", "repeat"))
    if action == "value":
        holder[key] = _value(rng)
    elif action == "other":  # a part of another body, or of this one
        there, name = rng.choice(list(_places(rng.choice(TAKEN)[1])))
        holder[key] = copy.deepcopy(there[name])
    elif action == "drop":
        del holder[key]
    elif action == "name" and isinstance(holder, dict):
        holder[rng.choice(_FIELDS)] = holder.pop(key)
    elif action == "add" and isinstance(body, dict):
        body[rng.choice(_FIELDS)] = _value(rng)
    elif isinstance(holder[key], (list, str)):
        holder[key] = holder[key] * rng.choice((2, 5, 30))
    return body


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.randint(1, 20))
    return rng.choice(
        (
            data[:at],
            data[:at] + rng.randbytes(rng.randint(1, 4)) + data[at:],
            data[:at]
            + rng.choice((b"NaN", b"-Infinity", b"\xff", b'"a":1,', b"\\u", b"["))
            + data[end:],
            data[:at] + data[at:end] * 3 + data[end:],
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            data + data,
        )
    )
