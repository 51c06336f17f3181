"""`mllama serve` over two ranks: the answers of one process, and the end of both when one of them is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

import httpx2
from asked_pictures import SEEDS, about
from server_helpers import eventually
from server_process import CHAT, Child, child, slow_steps

# Sums over ranks round otherwise, which in bfloat16 is seen in what is drawn.
EXACT = ("--dtype", "float32")
# What the demo model says to words without a picture is of no sense, and of any length.
LONG = {"max_tokens": 1500, "ignore_eos": True}
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "shape",
        "schema": {
            "type": "object",
            "properties": {
                "colour": {"enum": ["red", "green", "blue"]},
                "count": {"enum": [1, 2, 3]},
            },
            "required": ["colour", "count"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with child(tmp_path_factory.mktemp("ranks") / "log", *EXACT, ranks=2) as made:
        yield made


def asked() -> list[dict[str, Any]]:
    hello: list[dict[str, Any]] = [{"role": "user", "content": "Hello."}]
    return [
        {"messages": hello, "max_tokens": 24, "temperature": 0},
        {"messages": hello, "max_tokens": 24, "temperature": 1.2, "seed": 7, "n": 3},
        {"messages": hello, "max_tokens": 60, "temperature": 1, "seed": 3, "response_format": FORM},
        {"messages": hello, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3},
        {"messages": hello, "max_tokens": 24, "frequency_penalty": 1, "repetition_penalty": 1.2},
        *({"messages": about(seed), "temperature": 0} for seed in SEEDS),
    ]


def answers(server: Child) -> list[list[dict[str, Any]]]:
    """The choices of all, asked at once."""

    def one(body: dict[str, Any]) -> list[dict[str, Any]]:
        response = httpx2.post(server.url + CHAT, json=body, timeout=300)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(one, asked()))


def test_answers_are_those_of_one_process(server, tmp_path):
    with child(tmp_path / "log", *EXACT, ranks=1) as alone:
        ours, theirs = answers(server), answers(alone)
    told = [choices[0].pop("logprobs") for choices in (ours[3], theirs[3])]
    assert ours == theirs
    found, expected = ([token["logprob"] for token in one["content"]] for one in told)
    assert found == pytest.approx(expected, abs=1e-4)
    assert json.loads(ours[2][0]["message"]["content"])["colour"] in ("red", "green", "blue")


def test_pictures_are_computed_once_and_everything_is_given_back(server):
    before = server.metrics()
    content = about(77)[0]["content"]
    for _ in range(3):
        assert server.ask(content, temperature=0).status_code == 200
    with server.send("Hi", stream=True, **LONG) as connection:
        connection.recv(1000)  # and gone
    eventually(lambda: server.metrics()["answers_running"] == 0)
    after = server.metrics()
    assert after["encoded_pictures_total"] == before["encoded_pictures_total"] + 1
    assert after["picture_hits_total"] == before["picture_hits_total"] + 2
    assert after["pages_used"] == after["tiles_used"] == 0


def read_until(connection: socket.socket, words: bytes) -> None:
    """Read an answer as it comes, until there are these words."""
    found = b""
    while words not in found:
        piece = connection.recv(65_536)
        assert piece, found
        found += piece


def test_a_rank_that_is_killed_ends_what_runs_and_the_process(tmp_path):
    words = ("--drain-timeout", "600")
    with child(tmp_path / "log", *words, ranks=2, sabotage=slow_steps) as server:
        with ThreadPoolExecutor(2) as threads:
            whole = threads.submit(server.ask, "Hi", **LONG)
            connection = server.send("Hello", stream=True, **LONG)
            read_until(connection, b"data: ")
            eventually(lambda: server.metrics()["answers_running"] == 2)
            server.others[0].kill()
            eventually(lambda: server.health() == 503)
            assert whole.result().status_code == 500
            rest = b""
            while data := connection.recv(100_000):
                rest += data
            assert b"event: error" in rest or b'"error"' in rest, rest[-500:]
        assert server.wait() == 1  # long before the drain ends
        assert re.search(
            r"mllama serve: the ranks do not compute together any longer: .*", server.log
        )
        assert "Traceback" not in server.log


def test_it_is_started_on_several_devices_drains_and_leaves_nobody(tmp_path):
    command = [sys.executable, "-m", "mllama", "serve", "--port", "0", "--devices", "cpu,cpu"]
    command += ["--drain-timeout", "300"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, env=environment, start_new_session=True)
    try:
        eventually(lambda: " ready: " in log.read_text() or process.poll() is not None, 300)
        found = re.search(r"listening on (http://\S+)/;", log.read_text())
        assert found is not None, log.read_text()
        ranks = children(process.pid)
        assert len(ranks) == 2
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 600,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with httpx2.stream("POST", found[1] + CHAT, json=body, timeout=300) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            *_, usage, end = filter(None, lines)
        assert end == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 600
        assert process.wait(120) == 0, log.read_text()
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [
        int(word) for word in text.split() if b"RANK=" in Path(f"/proc/{word}/environ").read_bytes()
    ]


def test_the_example_runs_under_torchrun_and_files_of_requests_are_answered(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "follow(" in b]
    (tmp_path / "example.py").write_text(block)
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(asked())
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = ["generate", "--batch", "asked.jsonl", "--output", "answered.jsonl"]
    commands = {
        "example": ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "example.py"],
        "batch": ["mllama", *batch, "--devices", "cpu,cpu"],
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, command in commands.items()
    }
    for name, process in started.items():
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
        assert bool(out.strip()) == (name == "example")
    answered = [json.loads(line) for line in (tmp_path / "answered.jsonl").read_text().splitlines()]
    assert sorted(line["custom_id"] for line in answered) == sorted(map(str, range(len(lines))))
    assert all(line["response"]["status_code"] == 200 for line in answered)
