"""Faults before `mllama serve` itself, in a process of its own with the demo model: it answers what it can,
gives back what it held, and ends when it has to."""

from __future__ import annotations

import base64
import io
import json
import random
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

import httpx2
import image_bombs
import image_files
import torch
from free_ports import reserved
from safetensors.torch import load_file, save_file
from server_helpers import Listener, eventually, http_answer, listening
from server_process import CHAT, Child, child, steps_that_can_be_held

from mllama.demo import checkpoint_path, sample_picture
from mllama.engine.runner import Runner
from mllama.processing.tokenizer import MllamaTokenizer
from mllama.server.body import BodyBounds

POISON = "~"  # whose embedding is no number
LIMITS = {"head_seconds": 4.0, "reader_seconds": 4.0, "body": BodyBounds(max_seconds=4.0)}
HERE = ("127.0.0.1", "localhost", "[::1]", "2130706433", "127.1", "0")  # this machine, spelled


def png(seed: int = 3) -> bytes:
    file = io.BytesIO()
    sample_picture(seed)[0].save(file, "PNG")
    return file.getvalue()


def link(data: bytes | str, kind: str = "png") -> dict[str, Any]:
    if isinstance(data, bytes):
        data = f"data:image/{kind};base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": data}}


def picture_and(words: str, *others: Any, seed: int = 3) -> list[dict[str, Any]]:
    return [link(png(seed)), *others, {"type": "text", "text": words}]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert "Traceback" not in response.text and "site-packages" not in response.text
    assert "Error(" not in response.text and " object at 0x" not in response.text
    return error


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The demo model, of which one token is poison."""
    folder = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(checkpoint_path(), folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    token = MllamaTokenizer.from_pretrained(folder)(POISON, add_special_tokens=False)
    weights[name][token["input_ids"][0]] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def allow_few_files() -> None:
    """As many systems do; and steps can be held."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    steps_that_can_be_held()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with listening(http_answer()) as made:
        yield made


@pytest.fixture(scope="module")
def server(model, listener, tmp_path_factory) -> Iterator[Child]:
    log = tmp_path_factory.mktemp("log") / "server"
    with reserved() as port:
        hosts = [f"{host}:{p}" for host in HERE for p in (port, listener.port)]
        options = [word for host in hosts for word in ("--allow-image-host", host)]
        options += ["--model", str(model), "--max-batch-size", "2", "--max-batch-tokens", "16"]
        with child(log, *options, port=port, limits=LIMITS, sabotage=allow_few_files) as made:
            yield made


def is_idle(server: Child) -> bool:
    """Whether nothing is held any more."""
    held = ("requests_open", "answers_running", "answers_waiting", "pages_used", "tiles_used")
    found = server.metrics()
    return not any(found[name] for name in held)


def read_stream(connection: socket.socket) -> bytes:
    """To its end."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_until(connection: socket.socket, words: bytes) -> bytes:
    said = b""
    while words not in said:
        data = connection.recv(65536)
        assert data, said
        said += data
    return said


@pytest.fixture(autouse=True)
def nothing_is_left(request) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        made = request.getfixturevalue("server")
        eventually(lambda: is_idle(made), 120)
        assert made.health() == 200
        assert "Traceback" not in made.log


LONG = {"max_tokens": 2000, "ignore_eos": True}
SOME = {"max_tokens": 200, "ignore_eos": True}


# Pictures


@pytest.mark.parametrize("host", HERE)
def test_no_address_of_this_machine_is_connected_to(server, listener, host):
    """Though the command line names it."""
    for port in (listener.port, server.port):  # its own, too
        url = f"http://{host}:{port}/static/samples/1.png"
        error = error_of(server.ask(picture_and("a", link(url))), 400)
        assert error["param"] == "messages[0].content[1]" and error["code"] == "invalid_image"
        assert "no host of the public internet" in error["message"]
    error = error_of(server.ask([link(f"http://{host}:1/a.png")]), 400)
    assert "--allow-image-host" in error["message"]
    assert listener.connections == 0


def bombs() -> dict[str, Callable[[], bytes]]:
    f = image_files
    return {
        "a large PNG": lambda: f.png(image_bombs.SIDE, image_bombs.SIDE + 20),
        "a text in a PNG": lambda: f.png(8, 8, before=[f.text_bomb(b"zTXt")] * 200),
        "scans of a JPEG": image_bombs.jpeg()["scans without data"][0],
        "a size of a JPEG": image_bombs.jpeg()["one column"][0],
        "a truncated PNG": lambda: png()[: len(png()) // 2],
        "a truncated JPEG": lambda: f.jpeg(64, 64)[:200],
        "a header alone": lambda: png()[:20],
        "no picture": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "zeros": lambda: bytes(1000),
        "a path": lambda: b"/etc/passwd",
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bad_picture_is_named_by_its_place(server, name):
    bad = link(bombs()[name]())
    start = server.memory()
    error = error_of(server.ask(picture_and("a", bad)), 400)
    assert error["param"] == "messages[0].content[1]", error
    assert error["message"].startswith("messages[0].content[1]: ") and "/etc" not in str(error)
    assert server.memory() - start < 200 * 2**20


def test_a_picture_that_was_seen_is_not_opened_again(server):
    def known() -> float:
        return server.metrics()["picture_files_known_total"]

    before = known()
    first = server.ask(picture_and("What is in the image?", seed=31), temperature=0)
    assert known() == before
    again = server.ask(picture_and("What is in the image?", seed=31), temperature=0)
    assert known() == before + 1
    assert first.json()["choices"] == again.json()["choices"]


# Clients that go, at every point


def test_a_client_may_go_at_any_time(server):
    data = json.dumps({"messages": [{"role": "user", "content": "a"}], **LONG}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    for count in (10, len(head), len(whole) - len(data), len(whole) - 5):  # head and body
        with server.connect() as connection:
            connection.sendall(whole[:count])
            time.sleep(0.05)
    eventually(lambda: is_idle(server), 120)

    with server.send(picture_and("a " * 300), **LONG):  # while it is prepared
        pass
    eventually(lambda: is_idle(server), 120)

    before = server.metrics()["steps_total"]
    with server.held():
        with server.send(picture_and("red " * 500), **LONG):  # while it is read: 30 steps or more
            eventually(lambda: server.metrics()["answers_running"], 120)
        eventually(lambda: server.metrics()["requests_open"] == 0, 120)
    eventually(lambda: is_idle(server), 120)
    assert server.metrics()["steps_total"] - before < 10  # of some 1400 to its end

    with server.held():
        running = [server.send(picture_and("a", seed=i), stream=True, **LONG) for i in range(2)]
        eventually(lambda: server.open_answers() == 2, 120)
        with server.send("a", **LONG):  # while it waits for the two
            eventually(lambda: server.open_answers() == 3, 120)
        eventually(lambda: server.metrics()["requests_open"] == 2, 120)
    eventually(lambda: server.metrics()["answers_waiting"] == 0, 120)
    for connection in running:  # in the stream
        read_until(connection, b"data: ")
        connection.close()
    eventually(lambda: is_idle(server), 120)


def test_slow_senders_are_left_and_others_answered(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = []
    for i in range(20):
        slow.append(server.connect())
        slow[-1].sendall((head + "Content-Length: 1000\r\n\r\n{" * (i % 2)).encode())
    assert server.ask("Hi.", max_tokens=3).status_code == 200
    for i, connection in enumerate(slow):
        said = read_stream(connection)
        assert (b"request_timeout" in said) == (i % 2 == 1), said
        connection.close()


def test_many_connections_at_once(server):
    """More than the files that a process may open by itself; each is answered."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    kept = []
    for _ in range(500):
        kept.append(server.connect())
        kept[-1].sendall(request)
    for connection in kept:
        assert read_stream(connection).endswith(b'{"status":"ready"}')
        connection.close()


# What is wrong inside


def test_an_answer_that_is_no_number_ends_alone(server):
    with server.send("Hi.", stream=True, **SOME) as other:
        read_until(other, b"data: ")
        error = error_of(server.ask(f"Hi {POISON}."), 500)
        assert "not finite" in error["message"] and error["code"] == "generation_failed"
        read_until(other, b"data: [DONE]")
    with server.send(f"Hi {POISON}.", stream=True) as connection:
        assert b"[DONE]" not in read_until(connection, b"not finite")
    assert server.ask("Hi.", max_tokens=3).status_code == 200


def test_a_poisoned_schema_is_refused_and_others_go_on(server):
    properties = {f"p{i}": {"type": "string"} for i in range(3000)}
    poison = {"type": "object", "properties": properties}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": poison}}
    with server.send("Hi.", stream=True, **SOME) as other:
        read_until(other, b"data: ")
        refused = server.ask("Hi.", response_format=form)
        assert "response_format" in error_of(refused, 400)["message"]
        read_until(other, b"data: [DONE]")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1, 2]}}}
    found = server.ask("Hi.", response_format=form, max_tokens=20)
    assert json.loads(found.json()["choices"][0]["message"]["content"]) in (1, 2)


def fail_every_step() -> None:
    def launch(self: Runner, plan: Any) -> Any:
        raise RuntimeError("/secret/path")

    Runner.launch = launch


def test_an_engine_that_fails_three_times_in_a_row_ends_the_process(tmp_path):
    limits = {"body": BodyBounds(max_seconds=600)}
    options = {"limits": limits, "sabotage": fail_every_step}
    with child(tmp_path / "log", "--drain-timeout", "600", **options) as server:
        for i in range(3):
            assert server.health() == 200
            holder = server.connect()  # a request that is not there yet: the process waits for it
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            holder.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
            if i == 2:
                eventually(lambda: server.metrics()["requests_open"] >= 1, 120)
            else:
                holder.close()
            error = error_of(server.ask("Hi."), 500)
            assert "secret" not in error["message"]
        eventually(lambda: server.health() == 503, 120)
        assert error_of(server.ask("Hi."), 503)["code"] == "server_unavailable"
        assert server.wait(0) is None
        holder.close()
        assert server.wait() == 1
        assert "RuntimeError: /secret/path" in server.log  # for whoever runs it


# Its end


def test_killed_it_starts_again_on_the_same_port_and_drains_under_load(tmp_path):
    with reserved() as port, child(tmp_path / "log", port=port) as first:
        with first.send("Hi.", stream=True, **LONG) as lost:
            read_until(lost, b"data: ")
            first.signal(signal.SIGKILL)
            assert first.wait() == -signal.SIGKILL
            words = ("--drain-timeout", "600")
            sabotage = steps_that_can_be_held
            with child(tmp_path / "log", *words, port=port, sabotage=sabotage) as second:
                assert second.port == first.port == port
                assert second.ask("Hi.", max_tokens=3).status_code == 200
                drained(second)


def drained(server: Child) -> None:
    """Running answers are finished, nobody else is let in, and it ends with 0."""
    options = {"max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.held():
        streams = [server.send(picture_and("Hi.", seed=i), **options) for i in range(8)]
        eventually(lambda: server.open_answers() == 8, 120)
        server.signal(signal.SIGTERM)
        eventually(lambda: server.health() == 503, 120)
        assert error_of(server.ask("Hi."), 503)["code"] == "server_unavailable"
    for connection in streams:
        read_until(connection, b"data: [DONE]")
        connection.close()
    assert server.wait() == 0 and "Traceback" not in server.log


@pytest.mark.full
def test_its_memory_is_flat_for_ten_minutes(tmp_path):
    """What is asked for in the last minutes finds all buffers at their size; a leak of 10 KB for each
    request would be seen."""
    with child(tmp_path / "log", "--max-batch-size", "8") as server:
        end, count = time.monotonic() + 600, 0
        lock = threading.Lock()

        def work(seed: int) -> None:
            nonlocal count
            rng = random.Random(seed)
            while time.monotonic() < end:
                one_of_many(server, rng)
                with lock:
                    count += 1

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(180)
        before, first = count, server.memory()
        for thread in threads:
            thread.join()
        eventually(lambda: is_idle(server), 120)
        assert count - before > 200
        assert server.memory() - first < max(10_000 * (count - before), 2**25)
        assert "Traceback" not in server.log


def one_of_many(server: Child, rng: random.Random) -> None:
    """A request as it comes, good or bad, read to its end or left."""
    kind = rng.randrange(5)
    if kind == 0:
        content = picture_and("What is in the image?", seed=rng.randrange(10_000))
        assert server.ask(content, max_tokens=20).status_code in (200, 429)
    elif kind == 1:
        with server.send(f"Hi {rng.random()}", stream=True, **LONG) as connection:
            connection.recv(1000)
    elif kind == 2:
        assert server.ask([link(rng.randbytes(1000))]).status_code in (400, 429)
    elif kind == 3:
        form = {"type": "json_object"}
        found = server.ask(f"Hi {rng.random()}", response_format=form, max_tokens=20)
        assert found.status_code in (200, 429)
    else:
        assert server.ask(f"Hi {rng.random()}", n=3, max_tokens=10).status_code in (200, 429)
