"""What Open WebUI sends to a server, written down: for its list of models, chats and their abort."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

import httpx2
from asked_pictures import SEEDS, about, describes
from server_helpers import eventually

# It joins paths to an address that ends with /v1.
LIST_SECONDS = 10
HEADERS = {
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Ada%20L",
    "X-OpenWebUI-User-Id": "0b1c",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "9f2e",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate, br",
    "User-Agent": "Python/3.11 aiohttp/3.12",
}


def chat(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A turn as a person's settings make it: those that are not set are not sent."""
    return {
        "stream": True,
        "model": "mllama-demo",
        "messages": messages,
        "stream_options": {"include_usage": True},
        **fields,
    }


def lines(server: Any, body: dict[str, Any]) -> list[str]:
    url = f"{server.url}/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, headers=HEADERS, timeout=300) as found:
        assert found.status_code == 200, found.read()
        assert "text/event-stream" in found.headers["content-type"]
        return [line for line in found.iter_lines() if line]


def events(found: list[str]) -> list[dict[str, Any]]:
    assert found[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in found[:-1]]


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(e["choices"][0]["delta"].get("content", "") for e in found if e["choices"])


def test_the_list_of_models_comes_in_time_while_answers_run(demo_server):
    """It shows no model of a server that needs longer."""
    url = f"{demo_server.url}/v1/chat/completions"
    body = chat(about(SEEDS[0]), ignore_eos=True)
    with httpx2.stream("POST", url, json=body, headers=HEADERS, timeout=300) as stream:
        next(stream.iter_lines())
        start = time.monotonic()
        found = httpx2.get(f"{demo_server.url}/v1/models", headers=HEADERS, timeout=LIST_SECONDS)
        assert time.monotonic() - start < LIST_SECONDS
    assert [entry["id"] for entry in found.json()["data"]] == ["mllama-demo"]
    assert found.json()["object"] == "list"


def test_a_chat_with_a_picture(demo_server):
    """With what its drawer of settings can add, and words of its own that are no parameters."""
    settings = {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 128,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repeat_penalty": 1.1,
        "seed": 42,
        "stop": ["###"],
        "logit_bias": {"5": -1},
        "reasoning_effort": "medium",
        "num_ctx": 2048,
        "user": {"name": "Ada", "role": "admin"},
    }
    system = {"role": "system", "content": "You see pictures."}
    found = events(lines(demo_server, chat([system, *about(SEEDS[0])], **settings)))
    assert found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] > 0
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    plain = events(lines(demo_server, chat(about(SEEDS[0]))))
    assert describes(text_of(plain), SEEDS[0])


def test_a_title_is_asked_for_behind_the_first_answer(demo_server):
    body = {
        "model": "mllama-demo",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title."}],
        "stream": False,
        "max_completion_tokens": 50,
    }
    url = f"{demo_server.url}/v1/chat/completions"
    found = httpx2.post(url, json=body, headers=HEADERS, timeout=300)
    assert found.status_code == 200
    assert isinstance(found.json()["choices"][0]["message"]["content"], str)


def test_an_abort_ends_the_answer(demo_server):
    """It closes the connection, in the midst of a chunk or before the first."""
    body = json.dumps(chat(about(SEEDS[0]), ignore_eos=True)).encode()
    no_key = {"Authorization": "Bearer "}  # as it says that it has none
    fields = {
        **HEADERS,
        **no_key,
        "Host": f"127.0.0.1:{demo_server.port}",
        "Content-Length": str(len(body)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + body
    for is_read in (True, False):
        with demo_server.held(), demo_server.connect() as connection:
            connection.sendall(request)
            eventually(lambda: demo_server.metrics()["requests_open"] == 1)
            if is_read:
                assert b"200 OK" in connection.recv(100)
        eventually(lambda: demo_server.metrics()["answers_running"] == 0)
        eventually(lambda: demo_server.metrics()["requests_open"] == 0)
    assert demo_server.metrics()["pages_used"] == 0
