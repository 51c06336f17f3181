"""The server over a loopback socket, before an engine that echoes: clients, streams, keys, ends."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
from grammar_helpers import demo_compiler
from server_helpers import (
    PATIENCE,
    PNG,
    EchoEngine,
    Running,
    eventually,
    openai_client,
    served,
    web,
)
from server_process import NURSERY

from mllama.server import sse
from mllama.server.app import create_app
from mllama.server.body import BodyBounds
from mllama.server.listening import bind, serve
from mllama.server.settings import Settings
from mllama.server.sse import EventStream
from mllama.server.watching import Gate, Watch

CHAT = "/v1/chat/completions"
OPEN = ("/", "/health", "/v1/health")  # beside the page's files
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(models=("echo", "demo"), top_k=7, max_new_tokens=6) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as found:
        yield found


def user(words: Any) -> list[Any]:
    return [{"role": "user", "content": words}]


def chat(words: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": user(words), **fields}


# The openai client


def test_chat(client, server):
    found = client.chat.completions.create(model="echo", messages=user("a b c"), temperature=0)
    (choice,) = found.choices
    assert choice.message.content == "a b c" and choice.finish_reason == "stop"
    assert choice.message.role == "assistant" and choice.logprobs is None
    assert found.model == "echo" and found.object == "chat.completion"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 3)
    assert found.usage.prompt_tokens_details.cached_tokens == 1
    options = server.engine.works[-1].options
    assert options.temperature == 0 and options.top_k == 7 and options.max_tokens == 6
    assert options.top_p is None and options.seed is None


def test_chat_in_a_stream(client):
    chunks = list(client.chat.completions.create(model="demo", messages=user("a b"), stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "a b"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 3 + ["stop"]
    assert {c.model for c in chunks} == {"demo"} and len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)
    chunks = list(
        client.chat.completions.create(
            model="echo", messages=user("a b"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 4
    assert all(c.usage is None for c in chunks[:-1])


def test_the_length_of_an_answer_is_cut(client, server):
    for asked, expected in [(2, 2), (6, 6), (1000, 6)]:
        found = client.chat.completions.create(
            model="echo", messages=user("a b c d e f g h"), max_completion_tokens=asked
        )
        assert found.usage.completion_tokens == expected
        assert found.choices[0].finish_reason == "length"


def test_some_answers_and_log_probabilities(client):
    arguments = {"model": "echo", "messages": user("a b"), "n": 3, "logprobs": True}
    found = client.chat.completions.create(**arguments, top_logprobs=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    content = found.choices[2].logprobs.content
    assert [t.token for t in content] == ["a", " b"] and content[1].bytes == [32, 98]
    assert [t.token for t in content[0].top_logprobs] == ["x", "x"]
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    assert [c.choices[0].index for c in chunks if c.choices[0].finish_reason] == [0, 1, 2]
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert len(tokens) == 6 and tokens[0].top_logprobs == []


def test_pictures_reach_the_engine_in_order(client, server):
    other = "data:image/png;base64," + base64.b64encode(b"other").decode()
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": other}},
    ]
    found = client.chat.completions.create(model="echo", messages=user(parts))
    assert found.choices[0].message.content == "see <picture> <picture>"
    first, second = server.engine.works[-1].pictures
    assert first.data == PNG and second.data == b"other"
    assert second.place == "messages[0].content[2]"
    parts[1]["image_url"]["url"] = "http://localhost/a.png"
    with pytest.raises(openai.BadRequestError, match="--allow-image-host localhost") as caught:
        client.chat.completions.create(model="echo", messages=user(parts))
    assert caught.value.param == "messages[0].content[1]" and caught.value.code == "invalid_image"


def test_completions(client, server):
    found = client.completions.create(model="echo", prompt="a b", max_tokens=5, logprobs=1)
    assert found.choices[0].text == "a b" and found.choices[0].logprobs.text_offset == [0, 1]
    assert found.choices[0].logprobs.top_logprobs == [{"x": -1.0}] * 2
    found = client.completions.create(model="echo", prompt=["a", "b c"], n=2)
    assert [choice.text for choice in found.choices] == ["a", "a", "b c", "b c"]
    assert found.usage.prompt_tokens == 3 and found.usage.completion_tokens == 6
    found = client.completions.create(model="echo", prompt=[1, 2])
    assert found.choices[0].text == "1 2" and server.engine.works[-1].prompt == (1, 2)


def test_completions_in_a_stream(server):
    # Without the client's validation, which refuses a reason of null, as OpenAI's own server sends it.
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        chunks = list(
            client.completions.create(
                model="echo",
                prompt=["a", "b c"],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        reasons[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert texts == ["a", "b c"] and reasons == ["stop", "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 6


def test_models(client):
    assert [model.id for model in client.models.list()] == ["echo", "demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_many_asynchronous_streams(server):
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.chat.completions.create(
            model="echo", messages=user(f"number {i}"), stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*[one(client, i) for i in range(16)])

    assert asyncio.run(all_of_them()) == [f"number {i}" for i in range(16)]


# Streams


def lines_of(
    server: Running, words: str, came: Callable[[str], Any] = lambda line: None, **fields: Any
) -> list[str]:
    """All lines of a stream; ``came`` is called with each as it comes."""
    body = chat(words, stream=True, **fields)
    with web.stream("POST", server.url + CHAT, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in response.headers
        lines = []
        for line in response.iter_lines():
            came(line)
            lines += [line] if line else []
        return lines


def test_the_end_of_a_stream(server):
    lines = lines_of(server, "a \u20ac\u2028\n b")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


@pytest.mark.parametrize("words", ["!fail a b", "!crash a b", "!short a b"])
def test_an_error_in_a_stream_is_its_last_event(server, words):
    lines = lines_of(server, words)
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"} and "secret" not in error["message"]
    assert len(lines) >= 3 and "[DONE]" not in "".join(lines)


def test_an_error_before_the_stream_is_a_status(server):
    assert web.post(server.url + CHAT, json=chat("!full", stream=True)).status_code == 429


def test_silence_is_broken_by_comments(server, client, monkeypatch):
    monkeypatch.setattr(sse, "SILENCE", 0.02)
    released = server.engine.released

    def at_a_comment(line: str) -> None:
        if line.startswith(":"):
            released.set()

    released.clear()
    lines = lines_of(server, "!held a", at_a_comment)
    assert any(line.startswith(":") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = client.chat.completions.create(model="echo", messages=user("!slow a"), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "!slow a"


def test_a_stream_ends_with_its_last_event_whoever_reads_it():
    """Its source ends while the client is slow to take what there was before."""

    async def run() -> list[bytes]:
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            await asyncio.sleep(0.05)
            sent.append(message.get("body", b""))

        async def events() -> Any:
            for i in range(3):
                yield {"i": i}
                await asyncio.sleep(0.02)

        async with AsyncExitStack() as stack:
            watch = await stack.enter_async_context(Watch(receive, Gate()))
            stream = EventStream(events(), watch, stack.pop_all())
        await asyncio.wait_for(stream({}, receive, send), PATIENCE)
        return sent

    assert b"".join(asyncio.run(run())).endswith(b'data: {"i":2}\n\ndata: [DONE]\n\n')


class JumpingLoop(asyncio.SelectorEventLoop):
    """Waits for no timer: its time goes to the next one at once."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


def test_a_comment_comes_after_15_seconds_of_silence():
    async def run() -> list[tuple[float, bytes]]:
        sent: list[tuple[float, bytes]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append((asyncio.get_running_loop().time(), message.get("body", b"")[:1]))

        async def events() -> Any:
            await asyncio.sleep(10)
            yield {}
            await asyncio.sleep(40)

        async with AsyncExitStack() as stack:
            watch = await stack.enter_async_context(Watch(receive, Gate()))
            stream = EventStream(events(), watch, stack.pop_all())
        await stream({}, receive, send)
        return sent

    loop = JumpingLoop()
    try:
        sent = loop.run_until_complete(run())
    finally:
        loop.close()
    assert [at for at, data in sent if data == b":"] == [25, 40]
    assert [at for at, data in sent if data == b"d"] == [10, 50]


# Ends


def connected(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE)


def raw_request(server: Running, body: dict[str, Any]) -> socket.socket:
    connection = connected(server)
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("words", ["!hang a b", "!hang-before a"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_work(server, words, stream):
    connection = raw_request(server, chat(words, stream=stream))
    eventually(lambda: server.engine.running)
    (key,) = server.engine.running
    connection.close()
    eventually(lambda: not server.engine.running and key in server.engine.cancelled)
    eventually(lambda: not server.app.state.gate.running)


def test_a_client_that_goes_while_it_sends(server):
    count = len(server.engine.works)
    connection = connected(server)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    eventually(lambda: server.app.state.gate.running)
    connection.close()
    eventually(lambda: not server.app.state.gate.running)
    assert len(server.engine.works) == count


def test_a_reader_that_takes_nothing_is_left():
    with served(reader_seconds=0.2) as server:
        connection = raw_request(server, chat("word " * 200_000, stream=True))
        eventually(lambda: server.engine.works)
        eventually(lambda: not server.app.state.gate.running)
        assert not server.engine.running
        connection.close()


def test_slow_senders_are_left():
    with served(head_seconds=0.3) as server:
        for sent in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: "):
            # This may be the slower one, and be left before it has sent anything.
            with connected(server) as connection, suppress(ConnectionError):
                connection.sendall(sent)
                assert connection.recv(1000) == b""
    with served(body=BodyBounds(max_seconds=0.2)) as server:
        with connected(server) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 9\r\n\r\n".encode())
            assert b"request_timeout" in b"".join(iter(lambda: connection.recv(10_000), b""))


def test_what_takes_longer_than_a_head_may_is_no_head():
    with served(head_seconds=2.0) as server, raw_request(server, chat("!held a")) as connection:
        eventually(lambda: server.engine.running)
        time.sleep(2.5)
        server.engine.released.set()
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_connections_have_a_limit():
    with served(max_connections=2) as server:
        kept = [connected(server) for _ in range(2)]
        eventually(lambda: web.get(server.url + "/health").status_code == 503)
        found = web.get(server.url + "/health")
        assert "too many connections" in found.json()["error"]["message"]
        for connection in kept:
            connection.close()
        eventually(lambda: web.get(server.url + "/health").status_code == 200)


def test_bodies_have_a_limit_together():
    with served(max_bytes_in_flight=2000) as server:
        assert web.post(server.url + CHAT, json=chat("a " * 500)).status_code == 200
        with raw_request(server, chat("!hang " + "a " * 500)):
            eventually(lambda: server.engine.running)
            refused = web.post(server.url + CHAT, json=chat("a " * 500))
            assert refused.status_code == 429 and "2000" in refused.json()["error"]["message"]
            assert web.post(server.url + CHAT, json=chat("a")).status_code == 200
        eventually(lambda: not server.app.state.gate.running)
        assert web.post(server.url + CHAT, json=chat("a " * 500)).status_code == 200


# Who may ask


def test_keys():
    with served(api_keys=("first", "second")) as server:
        for key in ("first", "second"):
            headers = {"Authorization": f"Bearer {key}", "Host": "any.example"}
            assert web.get(server.url + "/v1/models", headers=headers).status_code == 200
        routes = [(m, r.path) for r in server.app.routes for m in r.methods]
        asked = [(m, p) for m, p in routes if p not in OPEN and not p.startswith("/static/")]
        assert len(asked) >= 8 and len(routes) - len(asked) <= 10
        asked += [
            ("GET", path) for path in ("/nothing", "//", "/v1/models/x", "/static", "/Health")
        ]
        for method, path in asked:
            assert web.request(method, server.url + path).status_code == 401, path
        for value in ("Bearer third", "Bearer", "first", "Basic first", "Bearer first second", ""):
            found = web.get(server.url + "/v1/models", headers={"Authorization": value})
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
            assert found.json()["error"]["code"] == "invalid_api_key"
        for path in OPEN:
            assert web.get(server.url + path).status_code == 200, path
        assert "no key" in web.post(server.url + CHAT, json=chat("a")).json()["error"]["message"]
        assert not server.engine.works


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        (
            {"allowed_hosts": ("box.example",)},
            [
                "localhost",
                "LOCALHOST:8000",
                "127.0.0.1",
                "[::1]:80",
                "box.example:1",
                "box.example.",
            ],
            [
                "evil.example",
                "evil.example:8000",
                "192.168.1.5",
                "localhost.evil.example",
                "",
                "[::2]",
            ],
        ),
        ({"host": "0.0.0.0"}, ["192.168.1.5:80", "[fe80::1]", "localhost"], ["evil.example"]),
    ],
)
def test_hosts(options, good, bad):
    with served(**options) as server:
        for host in good:
            found = web.get(server.url + "/health", headers={"Host": host})
            assert found.status_code == 200, host
        for host in bad:
            found = web.get(server.url + "/health", headers={"Host": host})
            assert found.status_code == 400, host
            assert found.json()["error"]["code"] == "host_not_allowed"


def test_pages_of_other_origins(server):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    found = web.options(server.url + CHAT, headers=asked)
    assert not any(name.startswith("access-control") for name in found.headers)
    with served(allowed_origins=("https://a.example",), api_keys=("k",)) as other:
        found = web.options(other.url + CHAT, headers=asked)
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        found = web.get(other.url + "/v1/models", headers={"Origin": "https://a.example"})
        assert found.status_code == 401 and "access-control-allow-origin" in found.headers
        found = web.get(other.url + "/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in found.headers


# Facts


def test_metrics_and_version(server):
    web.post(server.url + CHAT, json=chat("a b", flavour=1, user="me"))
    web.post(server.url + CHAT, json=chat("a b", n=9))
    found = web.get(server.url + "/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        "mllama_requests_running 0.0",
        'mllama_answers_finished_total{reason="stop"} ',
        'mllama_requests_rejected_total{status="400"} ',
        "mllama_unknown_fields_total ",
        "mllama_generated_tokens_total ",
        "mllama_time_to_first_token_seconds_count ",
    ):
        assert line in found.text, found.text
    assert "mllama_requests_open 0.0" in found.text
    assert web.get(server.url + "/version").json() == {"version": "1"}


def test_the_description_holds_the_bodies(server):
    found = web.get(server.url + "/openapi.json").json()
    body = found["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rsplit("/", 1)[1]
    schemas = found["components"]["schemas"]
    assert schemas[name]["properties"]["temperature"]["description"] == "a number from 0 to 2"
    text = json.dumps(found)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(schemas)


# Draining


def test_draining_lets_answers_finish(server):
    with served() as other:
        gate, found = other.app.state.gate, []
        thread = threading.Thread(target=lambda: found.append(lines_of(other, "!held a b c d")))
        thread.start()
        eventually(lambda: other.engine.running)
        gate.draining = True
        assert web.get(other.url + "/health").json() == {"status": "draining"}
        refused = web.post(other.url + CHAT, json=chat("a"))
        assert refused.status_code == 503 and "ending" in refused.json()["error"]["message"]
        other.engine.released.set()
        thread.join(PATIENCE)
        assert found[0][-1] == "data: [DONE]"


def serve_echo(listens: Any, drain_seconds: float) -> None:
    """Sends its address when it has one. Its engine is dead behind SIGUSR1, and what it holds goes on behind
    SIGUSR2."""
    engine = EchoEngine()
    signal.signal(signal.SIGUSR1, lambda *_: setattr(engine, "state", "dead"))
    signal.signal(signal.SIGUSR2, lambda *_: engine.released.set())
    settings = Settings(("echo",), "1", port=0, drain_seconds=drain_seconds)
    app = create_app(engine, settings, demo_compiler(), False)
    sys.exit(serve(app, engine, settings, bind(settings.host, 0), listens.send))


@pytest.fixture
def process(request) -> Iterator[tuple[Any, Running]]:
    said, says = NURSERY.Pipe(duplex=False)
    child = NURSERY.Process(target=serve_echo, args=(says, request.param))
    child.start()
    says.close()  # where it ends before it listens, there is nothing to wait for
    try:
        assert said.poll(300)
        yield child, Running(None, None, said.recv().rstrip("/"))
    finally:
        child.kill()
        child.join()


def exit_code(child: Any) -> int | None:
    child.join(PATIENCE)
    return child.exitcode


def in_background(server: Running, words: str) -> tuple[threading.Thread, list[list[str]]]:
    """Asks for a stream, which has begun."""
    found: list[list[str]] = []
    begun = threading.Event()
    asked = (server, words, lambda line: begun.set())
    thread = threading.Thread(target=lambda: found.append(lines_of(*asked)))
    thread.start()
    assert begun.wait(PATIENCE)
    return thread, found


def is_draining(server: Running) -> bool:
    return web.get(server.url + "/health").json() == {"status": "draining"}


@pytest.mark.parametrize("process", [600.0], indirect=True)
def test_a_signal_ends_the_process_after_its_answers(process):
    child, server = process
    thread, found = in_background(server, "!held " + "a " * 10)
    os.kill(child.pid, signal.SIGTERM)
    eventually(lambda: is_draining(server))
    os.kill(child.pid, signal.SIGUSR2)
    thread.join(PATIENCE)
    assert found[0][-1] == "data: [DONE]" and exit_code(child) == 0


@pytest.mark.parametrize("process", [0.3], indirect=True)
def test_what_does_not_finish_in_time_gets_an_error(process):
    child, server = process
    thread, found = in_background(server, "!hang a b")
    os.kill(child.pid, signal.SIGTERM)
    thread.join(PATIENCE)
    assert "ended before" in found[0][-1] and exit_code(child) == 0


@pytest.mark.parametrize("process", [600.0], indirect=True)
def test_a_second_signal_ends_the_process_at_once(process):
    child, server = process
    with raw_request(server, chat("!hang a b")):
        eventually(lambda: "open 1.0" in web.get(server.url + "/metrics").text)
        os.kill(child.pid, signal.SIGTERM)
        eventually(lambda: is_draining(server))
        os.kill(child.pid, signal.SIGTERM)
        assert exit_code(child) == 1


@pytest.mark.parametrize("process", [1.0], indirect=True)
def test_a_dead_engine_ends_the_process_with_an_error(process):
    child, _ = process
    os.kill(child.pid, signal.SIGUSR1)
    assert exit_code(child) == 1
