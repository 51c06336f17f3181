"""What comes over the wire and is no request, or many at once; and what the event loop is kept from."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

import httpx2
from server_helpers import Running, eventually, served

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "a b"}]}).encode()
JSON = "Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served() as running:
        yield running


def answers(server: Running, sent: bytes) -> bytes:
    """All that the server says until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        said = b""
        with suppress(ConnectionError):  # it need not take all of what it refuses
            connection.sendall(sent)
        with suppress(ConnectionError):
            while data := connection.recv(65536):
                said += data
        return said


def post(fields: str, body: bytes = BODY, version: str = "1.1") -> bytes:
    return f"POST {CHAT} HTTP/{version}\r\n{fields}\r\n".encode("latin-1") + body


LENGTH = f"Content-Length: {len(BODY)}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
CHUNKS = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
HOST = "Host: localhost\r\n"
ODD = {
    "two lengths and a chunk": post(HOST + JSON + LENGTH + CHUNKED, CHUNKS),
    "two lengths": post(HOST + JSON + LENGTH + "Content-Length: 1\r\n"),
    "a length in a list": post(HOST + JSON + f"Content-Length: {len(BODY)}, 1\r\n"),
    "a length with a sign": post(HOST + JSON + f"Content-Length: +{len(BODY)}\r\n"),
    "a length that is none": post(HOST + JSON + "Content-Length: 0x10\r\n"),
    "another encoding": post(HOST + JSON + "Transfer-Encoding: xchunked\r\n", CHUNKS),
    "two encodings": post(HOST + JSON + CHUNKED + "Transfer-Encoding: identity\r\n", CHUNKS),
    "chunks of HTTP/1.0": post(HOST + JSON + CHUNKED, CHUNKS, "1.0"),
    "a chunk's length that is none": post(HOST + JSON + CHUNKED, b"zz\r\n" + BODY),
    "a chunk of more": post(HOST + JSON + CHUNKED, b"1\r\n" + BODY),
    "a blank before a colon": post(HOST + JSON + f"Content-Length : {len(BODY)}\r\n"),
    "a NUL": post(HOST + JSON + "X: a\0b\r\n" + LENGTH),
    "two hosts": post(HOST + HOST + JSON + LENGTH),
    "no host": post(JSON + LENGTH),
    "a blank in the target": f"GET /health /x HTTP/1.1\r\n{HOST}\r\n".encode(),
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(300),
    "a head without an end": f"GET / HTTP/1.1\r\n{HOST}X: ".encode() + b"a" * 100_000,
}


@pytest.mark.parametrize("name", ODD)
def test_requests_that_are_read_in_two_ways_are_refused(server, name):
    count = len(server.engine.works)
    said = answers(server, ODD[name])
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), said
    assert b"connection: close" in head.lower() and b"application/json" in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert len(server.engine.works) == count


def test_requests_behind_one_another_are_answered_in_order(server):
    """The second is not what the first one's body says it is."""
    inner = f"GET /metrics HTTP/1.1\r\n{HOST}\r\n".encode()
    first = f"GET /version HTTP/1.1\r\n{HOST}Content-Length: {len(inner)}\r\n\r\n".encode() + inner
    last = f"GET /v1/models HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(first + last)
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.count(b"HTTP/1.1 200 OK") == 2 and b"mllama_" not in said
    assert said.index(b'"version"') < said.index(b'"object":"list"')


def test_a_chunked_body_is_a_body(server):
    said = answers(server, post(HOST + JSON + CHUNKED + "Connection: close\r\n", CHUNKS))
    assert b'"content":"a b"' in said


def test_many_requests_at_once(server):
    def one(i: int) -> str:
        body = {"messages": [{"role": "user", "content": f"!slow {i}"}]}
        found = httpx2.post(server.url + CHAT, json=body, timeout=120)
        return found.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(64) as threads:
        assert list(threads.map(one, range(200))) == [f"!slow {i}" for i in range(200)]
    eventually(lambda: not server.app.state.gate.running)


def test_a_reader_of_other_answers_that_takes_nothing_is_left():
    with served(reader_seconds=0.3, head_seconds=0.3) as server:
        request = f"GET /openapi.json HTTP/1.1\r\n{HOST}\r\n".encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.settimeout(0.2)
            try:
                for _ in range(10_000):
                    connection.sendall(request)
            except OSError:  # the server reads no more, or has gone
                pass
            connection.settimeout(60)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                for _ in range(10_000):  # what it did send, and then that it is gone
                    time.sleep(0.01)
                    connection.sendall(b"G")


# What the event loop is kept from


def test_the_event_loop_goes_on_whatever_a_request_holds(server, monkeypatch):
    """No callback takes long, in time of the thread's own: other processes do not count."""
    spent: list[tuple[float, str]] = []
    run = asyncio.events.Handle._run

    def timed(handle: Any) -> None:
        start = time.thread_time()
        run(handle)
        spent.append((time.thread_time() - start, repr(handle)))

    picture = base64.b64encode(bytes(14 * 2**20)).decode()
    link = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    parts = [{"type": "text", "text": "a"}] * 1024
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"a":"b"}'}}] * 100
    tool = {"type": "function", "function": {"name": "f", "description": "a" * 2**21}}
    bodies: list[tuple[dict[str, Any], int]] = [
        ({"messages": [{"role": "user", "content": "a " * 15 * 2**20}]}, 400),
        ({"prompt": "a " * 10 * 2**20, "max_tokens": 1}, 404),
        ({"messages": [{"role": "user", "content": [link]}]}, 200),
        ({"messages": [{"role": "user", "content": parts}] * 8, "max_tokens": 1}, 200),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    *[{"role": "assistant", "content": None, "tool_calls": calls}] * 20,
                ],
                "tools": [tool],
            },
            200,
        ),
        ({"messages": [{"role": "user", "content": [link, parts[0]]}], "tools": [tool]}, 200),
        ({"messages": [{"role": "user", "content": "a"}], "x": list(range(250_000))}, 200),
    ]
    datas = [(json.dumps(body).encode(), status) for body, status in bodies]
    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    for data, status in datas:
        path = CHAT if status != 404 else "/v1/completion"
        headers = {"Content-Type": "application/json"}
        found = httpx2.post(server.url + path, content=data, headers=headers, timeout=120)
        assert found.status_code == status, found.text[:500]
    monkeypatch.undo()
    assert len(spent) > 100
    assert max(spent)[0] < 0.15, max(spent)


def test_json_in_strings_is_bounded(server):
    def asked(arguments: str, count: int = 1) -> httpx2.Response:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call] * count}
        messages = [{"role": "user", "content": "a"}, turn]
        return httpx2.post(server.url + CHAT, json={"messages": messages}, timeout=60)

    assert asked('{"a": [' + ",".join(["{}"] * 50_000) + "]}").status_code == 200
    found = asked('{"a": [' + ",".join(["{}"] * 200_000) + "]}")
    assert found.status_code == 400 and "characters" in found.json()["error"]["message"]
    found = asked('{"a": [' + ",".join(["{}"] * 80_000) + "]}", 20)
    assert found.status_code == 400 and "messages" in found.json()["error"]["message"]
    found = asked('{"a":' * 100_000)
    assert found.status_code == 400 and "Recursion" not in found.text
    deep = asked('{"a":' * 40_000 + "1" + "}" * 40_000)
    assert deep.status_code == 400 and "JSON object" in deep.json()["error"]["message"]
    assert threading.active_count() < 60
