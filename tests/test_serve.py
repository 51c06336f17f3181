"""The command `mllama serve`: its options, its start and end, and the examples of docs/serving.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from asked_pictures import SEEDS, describes
from server_helpers import EchoEngine, eventually, web

from mllama import cli
from mllama.commands import common, serve
from mllama.commands.usage import UsageError
from mllama.demo import checkpoint_path
from mllama.engine.interface import Unavailable
from mllama.server.deferred import Deferred
from mllama.server.listening import bind
from mllama.server.protocol import Work

COMMAND = [sys.executable, "-m", "mllama"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


def parsed(*arguments: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["serve", *arguments])


def settings(*arguments: str) -> Any:
    return serve.settings_of(parsed(*arguments), "/models/My-Model")


# Options


def test_options_reach_the_server(monkeypatch):
    monkeypatch.delenv("MLLAMA_API_KEY", raising=False)
    found = settings()
    assert found.models == ("mllama-demo",) and found.api_keys == ()
    assert (found.host, found.port, found.max_images) == ("127.0.0.1", 8000, 4)
    assert found.max_new_tokens is None and found.top_k is None
    assert found.body.max_bytes == 32 * 2**20 and found.drain_seconds == 30
    words = "--model a/b --host 0.0.0.0 --port 0 --max-new-tokens 50 --top-k 1 --max-images 2"
    more = "--max-body 1MB --drain-timeout 2.5 --system-with-images error --allow-host box"
    hosts = "--allow-image-host a.example --allow-image-host b.example --allow-origin https://c"
    found = settings(*words.split(), *more.split(), *hosts.split())
    assert found.models == ("a/b",) and found.port == 0 and found.max_new_tokens == 50
    assert found.top_k == 1 and found.max_images == 2 and found.body.max_bytes == 2**20
    assert found.drain_seconds == 2.5 and found.system_with_images == "error"
    assert found.image_hosts == ("a.example", "b.example")
    assert found.allowed_hosts == ("box",) and found.allowed_origins == ("https://c",)
    assert parsed("--image-cache-bytes", "1000").image_cache_bytes == 1000
    assert parsed("--image-cache-bytes", "1MB").image_cache_bytes == 2**20
    assert settings("--served-model-name", "x", "--served-model-name", "y").models == ("x", "y")


def test_the_models_name_is_that_of_its_folder(tmp_path):
    options = parsed("--model-path", str(tmp_path))
    assert serve.settings_of(options, str(tmp_path)).models == (tmp_path.name,)


def test_keys_come_from_the_command_line_or_else_the_environment(monkeypatch):
    monkeypatch.setenv("MLLAMA_API_KEY", "theirs")
    assert settings().api_keys == ("theirs",)
    assert settings("--api-key", "a", "--api-key", "b").api_keys == ("a", "b")
    for key in ("", " ", "a b", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel"):
        with pytest.raises(UsageError, match="key"):
            settings("--api-key", key)


def test_what_a_person_should_know_is_told():
    def told(*arguments: str) -> str:
        options = parsed(*arguments)
        return "\n".join(serve.warnings_of(options, serve.settings_of(options, "/m")))

    assert told() == "" and told("--host", "localhost") == ""
    assert "--api-key" in told("--host", "0.0.0.0") and "--api-key" in told("--host", "box")
    assert told("--host", "0.0.0.0", "--api-key", "k") == ""
    assert "never needed" in told("--trust-remote-code")


@pytest.mark.parametrize(
    "arguments",
    [
        "--port 70000",
        "--port x",
        "--max-new-tokens 0",
        "--max-new-tokens -2",
        "--top-k 0",
        "--max-batch-size 0",
        "--drain-timeout -1",
        "--drain-timeout inf",
        "--max-body 5",
        "--device cpu --devices gpu",
        "--devices gpu-0,gpu-0",
        "--system-with-images ignore",
    ],
)
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments.split())
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "--dtype float32 --quantization-encoding bfloat16",
        "--serialized-model-path a --weight-path b",
        "--allow-origin *",
        "--allow-origin https://a.example/path",
        "--port 0 --max-batch-tokens 4 --max-batch-size 5",
    ],
)
def test_contradictions_exit_with_2_before_anything_is_loaded(arguments, capsys, monkeypatch):
    monkeypatch.setattr(serve, "load_weights", None)
    assert cli.main(["serve", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") <= 2


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ("--devices cpu", "cpu"),
        ("--devices gpu", "cuda"),
        ("--devices gpu-1", "cuda:1"),
        ("--device cuda:0 --devices gpu-0", "cuda:0"),
        ("", None),
    ],
)
@pytest.mark.parametrize("command", ["serve", "chat", "verify", "demo", "generate --prompt x"])
def test_a_device_has_two_spellings(command, given, device):
    options = cli.build_parser().parse_args([*command.split(), *given.split()])
    assert options.device == device


def test_devices_that_differ_are_named_as_they_were_given(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--devices", "cpu", "--device", "gpu-1")
    assert stop.value.code == 2
    assert "--device cuda:1 contradicts the cpu given before it" in capsys.readouterr().err


def test_weights_may_lie_elsewhere(tmp_path, capsys):
    weights, rest = tmp_path / "weights", tmp_path / "rest"
    shutil.copytree(checkpoint_path(), rest)
    weights.mkdir()
    shutil.move(rest / "model.safetensors", weights)
    arguments = [
        "generate",
        "--prompt",
        "Hi.",
        "--greedy",
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
    ]
    assert cli.main([*arguments, "--model-path", str(rest), "--weight-path", str(weights)]) == 0
    first = capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_a_hub_id_is_downloaded_anew(monkeypatch, tmp_path):
    asked = []

    def resolved(name: str, force_download: bool) -> Path:
        asked.append((name, force_download))
        return tmp_path

    monkeypatch.setattr(common, "resolve_folder", resolved)
    assert common.checkpoint_of(parsed("--model", "a/b")) == "a/b"
    assert common.checkpoint_of(parsed("--model", str(tmp_path), "--force-download")) == str(
        tmp_path
    )
    assert not asked
    assert common.checkpoint_of(parsed("--model", "a/b", "--force-download")) == str(tmp_path)
    assert asked == [("a/b", True)]


# Loading


def test_an_engine_that_is_being_made_says_so():
    go, told = threading.Event(), []
    engine = EchoEngine()

    def make() -> EchoEngine:
        go.wait(300)
        return engine

    found = Deferred(make, lambda: told.append("ready"))
    assert found.health() == "loading" and not told and found.stats().gauges == {}
    work = Work("key", None, prompt="a")
    with pytest.raises(Unavailable, match="loaded"):
        asyncio.run(found.submit(work))
    found.cancel("key")
    go.set()
    eventually(lambda: told)
    assert found.health() == "ready" and "requests_running" in found.stats().gauges
    found.cancel("key")
    assert engine.cancelled == {"key"}


def test_an_engine_that_cannot_be_made_is_dead():
    def make() -> EchoEngine:
        raise ValueError("no room")

    found = Deferred(make, lambda: None)
    eventually(lambda: found.health() == "dead")
    assert str(found.error) == "no room"


# The process


def test_it_says_where_it_listens_and_what_runs(demo_server):
    assert "no --model: using the demo model" in demo_server.log
    memory = r"memory: weights \d\.\d MB, [\d,]+ pages of 64 tokens .* in all, .* free on cpu"
    assert re.search(memory, demo_server.log.partition("listening")[0])
    assert re.search(r"ready: (kernels|reference) on cpu", demo_server.log)
    assert web.get(demo_server.url + "/health").json() == {"status": "ready"}
    assert web.get(demo_server.url + "/v1/models").json()["data"][0]["id"] == "mllama-demo"
    assert "Talk about a picture" in web.get(demo_server.url + "/").text


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_in_python_runs(demo_server, tmp_path):
    pytest.importorskip("openai")
    (code,) = [block for block in blocks("python") if "import OpenAI" in block]
    code = code.replace("http://127.0.0.1:8000", demo_server.url)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert describes(done.stdout, SEEDS[0]), done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_example_with_curl_runs(demo_server, tmp_path):
    (code,) = [block for block in blocks("bash") if "curl" in block]
    code = code.replace("http://127.0.0.1:8000", demo_server.url)
    done = subprocess.run(
        ["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert describes(done.stdout, SEEDS[0]), done.stdout


def test_the_example_of_a_file_of_requests_runs(tmp_path):
    (code,) = [block for block in blocks("bash") if "--batch" in block]
    code = f'mllama() {{ {shlex.join(COMMAND)} "$@"; }}\n{code}'
    done = subprocess.run(
        ["bash", "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "answered.jsonl").read_text().splitlines()]
    assert {line["custom_id"] for line in lines} == {"1", "2"}
    assert all(line["response"]["body"]["usage"]["completion_tokens"] > 0 for line in lines)


def test_options_on_the_page_exist(capsys):
    known = set()
    for command in ("serve", "generate"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z][a-z-]+)", PAGE)) <= known


def test_a_form_is_compiled_for_the_models_vocabulary(demo_server):
    body = {
        "messages": [{"role": "user", "content": "Hi."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"not": {}}},
        },
    }
    found = web.post(demo_server.url + "/v1/chat/completions", json=body)
    assert found.status_code == 400 and "not" in found.json()["error"]["message"]
    del body["response_format"]["json_schema"]["schema"]["not"]
    assert web.post(demo_server.url + "/v1/chat/completions", json=body).is_success


def started(*arguments: str) -> subprocess.Popen[str]:
    """The command, as a person starts it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "mllama", "serve", "--device", "cpu", "--port", "0"]
    return subprocess.Popen(
        [*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_while_it_loads(number):
    with started("--served-model-name", "x", "--trust-remote-code") as command:
        assert command.stderr is not None
        said = ""
        while "listening on" not in said:
            said += (line := command.stderr.readline())
            assert line, said
        command.send_signal(number)
        said += command.communicate(timeout=300)[1]
    assert command.returncode == 0 and "Traceback" not in said and "never needed" in said


def test_an_address_that_is_taken_is_named_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(serve, "load_processor", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == 1
    assert (
        f"127.0.0.1:{port} cannot be listened on: Address already in use" in capsys.readouterr().err
    )
    assert cli.main(["serve", "--host", "192.0.2.1"]) == 1
    assert "192.0.2.1:8000 cannot be listened on: it is no address" in capsys.readouterr().err
    assert cli.main(["serve", "--host", "no.such.host.invalid"]) == 1
    assert "no.such.host.invalid:8000 cannot be listened on" in capsys.readouterr().err


def test_a_name_of_several_addresses_is_listened_on_under_one_port():
    sockets = bind("localhost", 0)
    try:
        assert len({found.getsockname()[1] for found in sockets}) == 1
    finally:
        for found in sockets:
            found.close()


def test_a_model_that_cannot_be_loaded_ends_it_with_1(tmp_path):
    shutil.copytree(checkpoint_path(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with started("--model", str(tmp_path / "model")) as command:
        _, said = command.communicate(timeout=300)
    assert command.returncode == 1
    assert "model.safetensors is truncated" in said and "Traceback" not in said
