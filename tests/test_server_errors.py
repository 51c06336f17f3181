"""Every error has the one form, with words for a person and nothing of the inside."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

import httpx2
from server_helpers import Running, served, web

from mllama.engine.interface import Refused
from mllama.server.body import BodyBounds, parse_bounded
from mllama.server.errors import RequestError, as_request_error, json_shown, path_shown

CHAT = "/v1/chat/completions"
BOUNDS = BodyBounds(max_bytes=100_000, max_depth=20, max_keys=500, max_values=5000)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(body=BOUNDS) as running:
        yield running


def chat(words: str, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": words}], **fields}


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message and "Traceback" not in message and "/work" not in message
    assert "object at 0x" not in message and "Error(" not in message and "mllama/" not in message
    return body["error"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "must be a JSON object, got an array of 0 values"),
        (b'"a"', "must be a JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1, "a": 2}', "same key twice"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 50_000, "too many"),
        (b"[" * 30 + b"]" * 30, "too many levels; at most 20"),
        (b'{"a":' * 30 + b"1" + b"}" * 30, "too many levels"),
        (b"[" + b"0," * 6000 + b"0]", "too many values; at most 5000"),
        (json.dumps(dict.fromkeys(map(str, range(600)))).encode(), "too many keys; at most 500"),
        (b'{"a": "' + b"x" * 100_000 + b'"}', "more than 100000 bytes"),
    ],
)
def test_bodies_that_are_none(server, data, words):
    headers = {"Content-Type": "application/json"}
    response = web.post(server.url + CHAT, content=data, headers=headers)
    assert words in error_of(response, 413 if "bytes" in words else 400)["message"]


@pytest.mark.parametrize("text", ["[[[", '\\"[[[', "\\\\", '\\\\\\"{:,', "{}[]:,\\\\", "\u20ac\n"])
def test_what_is_in_strings_is_not_counted(text):
    value = {text: [text] * 3}
    bounds = BodyBounds(max_depth=2, max_keys=1, max_values=8)
    assert parse_bounded(json.dumps(value).encode(), bounds) == value
    with pytest.raises(RequestError, match="levels"):
        parse_bounded(json.dumps([value]).encode(), bounds)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_client_that_sends_too_much_reads_that_it_does(server, chunked):
    """It sends all of it before it reads."""
    pieces = [b"x" * 60_000] * 100
    content = iter(pieces) if chunked else b"".join(pieces)
    headers = {"Content-Type": "application/json"}
    with httpx2.Client() as client:
        for _ in range(2):
            response = client.post(server.url + CHAT, content=content, headers=headers)
            assert error_of(response, 413)["code"] == "request_too_large"
            content = b"".join(pieces)
        assert client.post(server.url + CHAT, json=chat("hi")).status_code == 200


def test_the_form_of_a_body_has_to_be_named(server):
    data = json.dumps(chat("hi")).encode()
    for headers, words in [
        ({}, "got none"),
        ({"Content-Type": "text/plain"}, '"text/plain"'),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "application/json"),
    ]:
        response = web.post(server.url + CHAT, content=data, headers=headers)
        assert words in error_of(response, 400)["message"]
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = web.post(server.url + CHAT, content=gzip.compress(data), headers=headers)
    assert "Content-Encoding" in error_of(response, 400)["message"]
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert web.post(server.url + CHAT, content=data, headers=headers).status_code == 200


def test_a_wrong_parameter_is_named(server):
    error = error_of(web.post(server.url + CHAT, json=chat("a", temperature=3)), 400)
    assert error == {
        "message": "temperature must be a number from 0 to 2, got 3",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_request",
    }
    assert not server.engine.works or server.engine.works[-1].options.temperature != 3


def test_routes_and_methods_that_are_none(server):
    error = error_of(web.get(server.url + "/v1/nothing"), 404)
    assert "/v1/nothing" in error["message"] and error["code"] == "not_found"
    response = web.get(server.url + CHAT)
    assert "POST" in error_of(response, 405)["message"] and response.headers["allow"] == "POST"
    for name in ("responses", "embeddings"):
        error = error_of(web.post(f"{server.url}/v1/{name}", json={}), 404)
        assert CHAT in error["message"]
    for path in ("/docs", "/redoc", "/v1/models/../../etc/passwd", "/%00", "/static/../x"):
        error_of(web.get(server.url + path), 404)


def test_models_that_are_none(server):
    for response in (
        web.get(server.url + "/v1/models/gpt-4o"),
        web.post(server.url + CHAT, json=chat("hi", model="gpt-4o")),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert '"gpt-4o"' in error["message"] and "echo" in error["message"]


def test_what_the_engine_says(server, caplog):
    error = error_of(web.post(server.url + CHAT, json=chat("!refuse")), 400)
    assert "9 tokens" in error["message"] and error["param"] == "messages"
    refused = as_request_error(Refused("too long", code="context_length_exceeded"))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    response = web.post(server.url + CHAT, json=chat("!full"))
    assert error_of(response, 429)["code"] == "server_overloaded"
    assert response.headers["retry-after"] == "2"
    error = error_of(web.post(server.url + CHAT, json=chat("!fail a b")), 500)
    assert "not finite" in error["message"] and error["type"] == "server_error"
    error = error_of(web.post(server.url + CHAT, json=chat("!crash a b")), 500)
    assert "secret" not in error["message"] and error["code"] == "internal_error"
    assert "/secret/path" in caplog.text
    assert (
        "ended before"
        in error_of(web.post(server.url + CHAT, json=chat("!short a b")), 500)["message"]
    )


@pytest.mark.parametrize("state", ["loading", "draining", "dead"])
def test_an_engine_that_is_not_ready(server, state):
    server.engine.state = state
    try:
        error_of(web.post(server.url + CHAT, json=chat("hi")), 503)
        for path in ("/health", "/v1/health"):
            response = web.get(server.url + path)
            assert response.status_code == 503 and response.json() == {"status": state}
    finally:
        server.engine.state = "ready"
    assert web.get(server.url + "/health").status_code == 200


def test_values_in_words_of_json():
    shown = {
        "a": '"a"',
        "x" * 100: '"' + "x" * 80 + '"... (100 characters)',
        10**100: "an integer of more than 77 digits",
        1.5: "1.5",
        None: "null",
        True: "true",
    }
    for value, text in shown.items():
        assert json_shown(value) == text
    assert json_shown({}) == "an object of 0 entries" and json_shown([1]) == "an array of 1 value"
    assert json_shown(object()) == "a value that is none of JSON"
    assert path_shown(("messages", 0, "content")) == "messages[0].content"
    assert len(path_shown(("x" * 1000,))) < 100


def test_an_exception_nobody_meant_says_nothing():
    assert as_request_error(KeyError("/secret")).message.startswith("the server failed")
