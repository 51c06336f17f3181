"""Ray: replicas of the server behind one address, and files of requests through Ray Data."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[ray]'")
pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install '.[ray]'")

import httpx2
import ray
import yaml
from asked_pictures import MODEL, SEEDS, about, describes
from free_ports import reserved
from openai import APIStatusError, OpenAI
from server_helpers import eventually
from test_batches import asked, written

from mllama import MllamaForConditionalGeneration, MllamaProcessor, cli
from mllama.commands import ray_serve
from mllama.commands.ray_options import NAME
from mllama.commands.usage import UsageError
from mllama.demo import checkpoint_path, sample_picture
from mllama.ray import app, serve_app

pytestmark = pytest.mark.ray
KEY = "a-key"
COMMAND = [sys.executable, "-m", "mllama", "ray"]
ENGINE = ["--device", "cpu", "--max-length", "512"]
PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of this process; who connects to it has its token in the environment."""
    token = secrets.token_hex(32)
    before = dict(os.environ)
    os.environ.update(RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0")
    for check in ("READY", "HEALTH"):  # a proxy that has not started in 15 seconds is ended
        os.environ[f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S"] = "120"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield token
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


# Options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_batch": 3}, "unrecognized arguments: --max-batch=3"),
        ({"max_batch_size": 0}, "0 is not above zero"),
        ({"max_batch_size": 8, "max_batch_tokens": 4}, "--max-batch-tokens 4 is less than"),
        ({"host": "0.0.0.0"}, "host is an option of ray.serve.start"),
        ({"device": "cuda:1"}, "--device must be cpu or gpu, Ray says which; got 'cuda:1'"),
        ({"save_to_serialized_model_path": "x"}, "use mllama quantize"),
        ({"api_key": ["a b"]}, "a key must be ASCII without blanks"),
        ({"num_replicas": 0}, "replicas must be a number, or the least and the most; got 0"),
        ({"num_replicas": [3, 2]}, r"got \[3, 2\]"),
        ({"devices_per_replica": 0}, "an engine needs a device and a core; got 0 and 1"),
        ({"device": "cpu,cpu"}, "--device must be cpu or gpu, Ray says which; got 'cpu,cpu'"),
        ({"collective_timeout": 9}, "--collective-timeout goes with several devices for each"),
        ({"cpus_per_replica": 0}, "an engine needs a device and a core; got 1 and 0"),
        ({"dtype": "float32", "quantization_encoding": "bfloat16"}, "contradict each other"),
    ],
    ids=str,
)
def test_options_that_are_wrong_are_named(given, said):
    with pytest.raises(UsageError, match=said):
        serve_app(**{"device": "cpu", **given})


def test_where_replicas_run_is_asked_of_a_cluster(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match="Ray does not run yet"):
        serve_app()


def test_limits_follow_the_options():
    """As many requests are open in a replica as its engine decodes and lets wait."""
    made = serve_app(
        None, (1, 3), device="gpu", max_batch_size=5, drain_timeout=7, api_key=["a", "b"]
    )
    deployment = made._bound_deployment
    assert deployment.max_ongoing_requests == 25 and deployment.max_queued_requests == 20
    assert deployment.ray_actor_options["num_gpus"] == 1
    scale = deployment._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (1, 3, 5)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    options, _, settings = deployment.init_args
    assert settings.api_keys == ("a", "b") and options.max_queue == 20
    assert options.device == "cuda:0"  # of those that the replica sees


def test_the_file_for_serve_deploy_is_one():
    from ray.serve.schema import ServeDeploySchema

    (block,) = re.findall(r"```yaml\n(http_options.*?)```", PAGE, re.DOTALL)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(block)).applications
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    made = app(application.args)
    assert {d.name for d in application.deployments} <= {made._bound_deployment.name}


def test_the_example_of_a_program_makes_an_application():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, made := {})
    assert made["application"]._bound_deployment.max_ongoing_requests == 16 * 5


@pytest.mark.parametrize("action", ["serve", "batch --input a --output b"])
def test_without_ray_a_command_says_what_to_install(capsys, monkeypatch, action):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert cli.main(["ray", *action.split()]) == 2
    assert "pip install 'mllama-kernels[ray,server]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serve --port 0", "--port 0 is not for Ray"),
        ("serve --device gpu-1", "--device must be cpu or gpu"),
        ("serve --devices cpu,cpu", "--device must be cpu or gpu"),
        ("serve --collective-timeout 9", "goes with several devices for each engine"),
        ("serve --max-batch-tokens 4", "--max-batch-tokens 4 is less than"),
        ("serve --address 127.0.0.1:1 --dashboard", "--dashboard is not for the cluster at"),
        ("batch --input x --output y --device gpu-1", "--device must be cpu or gpu"),
    ],
)
def test_a_command_refuses_before_anything_starts(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(ray, "init", None)
    assert cli.main(["ray", *arguments.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "3-2", "2-", "x"])
def test_replicas_are_a_number_or_a_range(text):
    with pytest.raises(ray_serve.argparse.ArgumentTypeError, match="must be like 4 or 2-8"):
        ray_serve._replicas(text)


# Replicas


def processes(fits: Callable[[bytes], bool], token: str) -> set[int]:
    """Those of a cluster, of all on the machine, whose command line fits."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if fits((folder / "cmdline").read_bytes()):
                if token.encode() in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def replicas(token: str) -> set[int]:
    return processes(lambda command: command.startswith(b"ray::ServeReplica:mllama"), token)


class Fleet:
    """`mllama ray serve` with two replicas of the demo model, in a process of its own."""

    def __init__(self, folder: Path, token: str, port: int) -> None:
        self.url, self._token = f"http://127.0.0.1:{port}", token
        self.log = folder / "log"
        words = ["--replicas", "2", "--port", str(port), "--api-key", KEY, "--max-batch-size", "4"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", *words, "--max-body", "1MB", *ENGINE], stdout=log, stderr=log
            )

    def client(self, max_retries: int = 2) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key=KEY, max_retries=max_retries, timeout=120)

    def pids(self) -> set[int]:
        return replicas(self._token)

    def metrics(self) -> dict[str, float]:
        """Of the replica that answers."""
        headers = {"Authorization": f"Bearer {KEY}"}
        text = httpx2.get(self.url + "/metrics", headers=headers, timeout=60).text
        pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}


class Fleets:
    """Fleets of a cluster, one at a time: the tests are asked in any order, and some end one."""

    def __init__(self, token: str, paths: pytest.TempPathFactory) -> None:
        self._token, self._paths, self._ports = token, paths, ExitStack()
        self._last: Fleet | None = None

    def running(self) -> Fleet:
        """The one that runs, or another."""
        if self._last is None or self._last.process.poll() is not None:
            self.end()
            port = self._ports.enter_context(reserved())
            self._last = made = Fleet(self._paths.mktemp("fleet"), self._token, port)
            while "listening on" not in made.log.read_text():
                assert made.process.poll() is None, made.log.read_text()
                time.sleep(0.1)
        return self._last

    def end(self) -> None:
        """Leave nothing of it in the cluster."""
        from ray import serve

        if self._last is not None:
            self._last.process.kill()
            self._last.process.wait()
        serve.shutdown()
        self._ports.close()


@pytest.fixture(scope="module")
def fleets(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    made = Fleets(cluster, tmp_path_factory)
    yield made
    made.end()


@pytest.fixture
def fleet(fleets: Fleets) -> Fleet:
    return fleets.running()


def test_a_cluster_that_is_started_has_a_token(cluster):
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_the_routes_are_those_of_the_server(fleet):
    assert httpx2.get(fleet.url + "/health", timeout=60).json() == {"status": "ready"}
    assert "<title>" in httpx2.get(fleet.url + "/", timeout=60).text
    assert [model.id for model in fleet.client().models.list()] == [MODEL]
    assert "mllama_steps_total" in fleet.metrics()
    with pytest.raises(APIStatusError) as refused:
        OpenAI(base_url=fleet.url + "/v1", api_key="another").models.list()
    assert refused.value.status_code == 401
    with pytest.raises(APIStatusError) as refused:
        fleet.client(0).completions.create(model=MODEL, prompt="x" * 2**21)
    assert refused.value.status_code == 413


def test_pictures_are_described_by_both_and_streamed(fleet):
    client = fleet.client()

    def answer(seed: int) -> str:
        made = client.chat.completions.create(model=MODEL, messages=about(seed), temperature=0)
        return made.choices[0].message.content

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(answer, SEEDS * 6))
    assert all(describes(text, seed) for text, seed in zip(answers, SEEDS * 6))
    counted = {fleet.metrics()["mllama_steps_total"] for _ in range(20)}
    assert len(counted) == 2 and min(counted) > 0
    stream = client.chat.completions.create(
        model=MODEL, messages=about(SEEDS[0]), temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == answers[0] and len(list(filter(None, pieces))) > 5


def test_a_client_that_goes_ends_its_request(fleet):
    stream = fleet.client().completions.create(
        model=MODEL, prompt="a", max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    name = 'mllama_answers_finished_total{reason="cancelled"}'
    eventually(lambda: fleet.metrics().get(name) == 1)


def test_a_replica_that_is_killed_is_replaced_while_the_other_answers(fleet):
    client, before = fleet.client(), fleet.pids()
    assert len(before) == 2
    answered, ends = [0] * 8, threading.Event()

    def ask(number: int) -> None:
        while not ends.is_set():
            client.completions.create(
                model=MODEL, prompt="a", max_tokens=60, extra_body={"ignore_eos": True}
            )
            answered[number] += 1

    def others_are_answered() -> None:
        known = list(answered)
        eventually(
            lambda: (
                any(one.done() for one in asked)  # which has failed
                or all(now > then for now, then in zip(answered, known))
            ),
            300,
        )

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, number) for number in range(8)]
        try:
            others_are_answered()
            os.kill(killed := min(before), signal.SIGKILL)
            others_are_answered()
        finally:
            ends.set()
        for one in asked:
            one.result()  # raises where a request has failed
    eventually(lambda: len(fleet.pids() - {killed}) == 2, 300)
    assert before - {killed} < fleet.pids()


def test_it_ends_when_its_answers_have(fleet):
    stream = fleet.client().completions.create(
        model=MODEL, prompt="a", max_tokens=450, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    fleet.process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert fleet.process.wait(300) == 0, fleet.log.read_text()
    assert not fleet.pids()


# Ranks of a replica


def ranks(token: str) -> set[int]:
    """The processes that replicas have started as ranks."""
    return processes(lambda command: b"spawn_main" in command, token)


def test_a_rank_and_its_replica_end_together(cluster, fleets):
    """A replica of two ranks answers as one process, and another takes its place where a rank is gone."""
    from ray import serve

    fleets.end()
    made = serve_app(devices_per_replica=2, device="cpu", max_length=512, api_key=[KEY])
    with reserved() as port:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(made, name=NAME)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120)
        expected = generated(SEEDS[:2])

        def answer(seed: int) -> str:
            asked = client.chat.completions.create(
                model=MODEL, messages=about(seed), temperature=0, max_tokens=60
            )
            return asked.choices[0].message.content

        assert {str(seed): answer(seed) for seed in SEEDS[:2]} == expected
        ((first,), (rank,)) = replicas(cluster), ranks(cluster)
        os.kill(rank, signal.SIGKILL)
        eventually(lambda: first not in replicas(cluster), 120)
        eventually(lambda: serve.status().applications[NAME].status == "RUNNING", 120)
        assert answer(SEEDS[0]) == expected[str(SEEDS[0])]
        ((second,), (rank,)) = replicas(cluster), ranks(cluster)
        os.kill(second, signal.SIGKILL)  # which has no time to end it
        eventually(lambda: rank not in ranks(cluster))
    finally:
        serve.shutdown()
    eventually(lambda: not replicas(cluster) and not ranks(cluster))


# Files


def pictures(folder: Path) -> tuple[Path, list[int]]:
    """Two files that ask about 64 pictures."""
    seeds = list(range(64))
    (asked_in := folder / "asked").mkdir()
    for name, some in (("a", seeds[:40]), ("b", seeds[40:])):
        lines = [
            asked(str(seed), about(seed)[0]["content"], temperature=0, max_tokens=60)
            for seed in some
        ]
        written(asked_in, *lines).rename(asked_in / f"{name}.jsonl")
    return asked_in, seeds


def generated(seeds: Sequence[int]) -> dict[str, str]:
    """What `generate` answers."""
    folder = checkpoint_path()
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    processor = MllamaProcessor.from_pretrained(folder, padding_side="left")
    texts: dict[str, str] = {}
    parts = [{"type": "image"}, {"type": "text", "text": about(0)[0]["content"][1]["text"]}]
    ask = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    for start in range(0, len(seeds), 16):
        some = seeds[start : start + 16]
        inputs = processor(
            images=[[sample_picture(seed)[0]] for seed in some],
            text=[ask] * len(some),
            return_tensors="pt",
            padding=True,
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts |= zip(map(str, some), processor.batch_decode(new, skip_special_tokens=True))
    return texts


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [
        json.loads(line) for text in texts for line in text.splitlines(True) if line[-1] == "\n"
    ]


def test_answers_are_those_of_generate_and_are_not_repeated_after_a_crash(
    cluster, capsys, tmp_path
):
    asked_in, seeds = pictures(tmp_path)
    out = tmp_path / "out"
    words = ["batch", "--input", f"{asked_in}/*.jsonl", "--output", str(out), *ENGINE]
    with subprocess.Popen([*COMMAND, *words, "--max-batch-size", "1"]) as process:
        while not (out.is_dir() and len(lines_of(out)) >= 3):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    before = {line["custom_id"]: line for line in lines_of(out)}
    assert 3 <= len(before) < len(seeds)
    with (out / "a.jsonl").open("a") as file:
        file.write('{"id": "cut of')

    assert cli.main(["ray", *words]) == 2
    assert "is there already: --resume goes on with it" in capsys.readouterr().err
    assert cli.main(["ray", *words, "--resume", "--replicas", "2"]) == 0
    after = lines_of(out)
    assert sorted(int(line["custom_id"]) for line in after) == seeds
    assert all(before.get(line["custom_id"], line) == line for line in after)
    bodies = {line["custom_id"]: line["response"]["body"] for line in after}
    texts = {name: body["choices"][0]["message"]["content"] for name, body in bodies.items()}
    assert texts == generated(seeds)
    capsys.readouterr()
    assert cli.main(["ray", *words, "--resume"]) == 0
    assert "all requests are answered already" in capsys.readouterr().err


def test_what_is_no_request_stands_beside_the_answers(cluster, capsys, tmp_path):
    path = written(tmp_path, asked("good", max_tokens=3), "nonsense", asked("bad", temperature=9))
    words = ["--input", path.as_uri(), "--output", str(tmp_path / "out"), *ENGINE]
    assert cli.main(["ray", "batch", *words]) == 1
    assert "2 of 3 requests were not answered" in capsys.readouterr().err
    found = {line["custom_id"]: line for line in lines_of(tmp_path / "out")}
    assert found["good"]["response"]["status_code"] == 200
    assert found["bad"]["response"]["status_code"] == 400
    assert "line 2: it is no JSON" in found[None]["error"]["message"]


def test_files_that_cannot_be_are_named(cluster, capsys, tmp_path):
    def said(pattern: str, *more: str) -> str:
        words = ["--input", pattern, "--output", str(tmp_path / "out"), *ENGINE, *more]
        assert cli.main(["ray", "batch", *words]) == 1
        return capsys.readouterr().err

    assert "is no file, and matches none" in said(str(tmp_path / "*.jsonl"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, asked("a"))
    assert "would both be answered in a file asked.jsonl" in said(str(tmp_path / "*" / "*.jsonl"))
    one = str(tmp_path / "one" / "asked.jsonl")
    assert "4 engines of 1 cores, and one core that reads" in said(one, "--replicas", "4")
    (tmp_path / "out" / "asked.jsonl").write_text(
        json.dumps({"custom_id": "z", "response": {"status_code": 200}}) + "\n"
    )
    assert "answers 'z', which" in said(one, "--resume")
