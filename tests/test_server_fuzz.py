"""Requests that no client means to send: no failure of the server, no hang, and what is documented."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
pytest.importorskip("schemathesis")

import httpx2
import hypothesis
import schemathesis
from fuzz_bodies import CHAT, TAKEN, changed
from server_helpers import eventually
from server_process import Child, child

SECONDS = 120.0  # in which every answer comes, also on a busy machine
INTERNALS = ("Traceback", "object at 0x", "site-packages", "Input should", "pydantic", "<class")
ROUTES = ["POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models/{name}"]
FACTS = ["/health", "/v1/health", "/metrics", "/version", "/v1/models"]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Child]:
    """Whose answers are short, whatever is asked."""
    with child(tmp_path_factory.mktemp("fuzz") / "log", "--max-new-tokens", "4") as made:
        yield made


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=SECONDS) as found:
        yield found


def check_error(found: httpx2.Response) -> None:
    """Its form, and that its words are for a person."""
    body = found.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert all(isinstance(error[name], str) for name in ("message", "type", "code"))
    assert error["param"] is None or isinstance(error["param"], str)
    assert not [word for word in INTERNALS if word in error["message"]], error
    assert 0 < len(error["message"]) < 1000, error


def check_answer(found: httpx2.Response) -> None:
    """A whole answer, or a whole stream."""
    assert found.status_code < 500, found.text
    if found.status_code != 200:
        check_error(found)
    elif found.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in found.iter_lines() if line]
        assert lines[-1] == "[DONE]", lines[-1]
        assert all("error" not in json.loads(line) for line in lines[:-1])
    else:
        assert all(choice["finish_reason"] for choice in found.json()["choices"])


def answer(client: httpx2.Client) -> str:
    """To a request that nothing is wrong with."""
    body = {"messages": [{"role": "user", "content": "Hello."}], "temperature": 0}
    found = client.post(CHAT, json=body)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"]


def test_what_is_changed_was_taken(client):
    for route, body in TAKEN:
        found = client.post(route, json=body)
        assert found.status_code == 200, (body, found.text)
        check_answer(found)


def send_changed(client: httpx2.Client, server: Child, seed: int, count: int) -> None:
    rng, before = random.Random(seed), answer(client)
    for i in range(count):
        route, data = changed(rng)
        try:
            found = client.post(route, content=data, headers={"Content-Type": "application/json"})
            check_answer(found)
        except (AssertionError, httpx2.HTTPError) as error:
            raise AssertionError(f"body {i} of seed {seed}: {route} {data[:2000]!r}") from error
    assert answer(client) == before
    eventually(lambda: server.metrics()["requests_open"] == 0)
    assert server.metrics()["pages_used"] == 0


def test_changed_bodies(client, server, seed):
    send_changed(client, server, seed, 400)


@pytest.mark.full
def test_many_changed_bodies(client, server, seed):
    send_changed(client, server, seed + 1, 10_000)


def send_generated(server: Child, route: str, seed: int, count: int) -> None:
    """Requests as the description has them, and others; all answers are as it describes them."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    method, path = route.split()
    modes = list(schemathesis.GenerationMode)
    if method == "GET":  # no word in an address is against it
        modes = [schemathesis.GenerationMode.POSITIVE]
    for mode in modes:
        strategy = schema[path][method].as_strategy(generation_mode=mode)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=strategy)
        def check(case: Any) -> None:
            # That fields fit together, and that a model is there, is beyond what a schema says.
            skipped = [schemathesis.checks.positive_data_acceptance]
            case.call_and_validate(server.url, excluded_checks=skipped, timeout=SECONDS)

        check()


@pytest.mark.parametrize("route", ROUTES)
def test_generated_requests(client, server, seed, route):
    send_generated(server, route, seed, 15)
    assert answer(client)


@pytest.mark.full
@pytest.mark.parametrize("route", ROUTES)
def test_many_generated_requests(client, server, seed, route):
    send_generated(server, route, seed + 1, 1000)
    assert answer(client)


def test_facts_are_as_described(client, server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for path in FACTS:
        case = schema[path]["GET"].Case()
        case.call_and_validate(server.url, timeout=SECONDS)
        found = client.put(path)
        assert found.status_code == 405 and found.headers["allow"] == "GET"
        check_error(found)
