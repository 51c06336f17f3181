"""The benchmark of the server: its client, the clock of processes, rounds, goals and tables."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

from server_helpers import Running, served  # noqa: E402

from benchmarks import serve  # noqa: E402
from benchmarks.budget import Budget  # noqa: E402
from benchmarks.serving import agreement, client, goals, load, requests, servers, tables  # noqa: E402
from benchmarks.serving.client import Answer, RequestFailed, ask, together  # noqa: E402
from benchmarks.serving.requests import LONGEST, Request, Source  # noqa: E402
from benchmarks.serving.run import PARTS, Effort, Run  # noqa: E402
from mllama.demo import checkpoint_path  # noqa: E402


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    with served() as running:
        yield running


def body(text: str, **others: Any) -> dict[str, Any]:
    request = requests.our_body("echo", Request(text))
    return request | others


# The client


def test_the_client_notes_each_piece(echo):
    answer = asyncio.run(ask(echo.port, body("one two words more")))
    assert answer.text == "one two words more" and answer.tokens == 4
    assert answer.finish_reason == "stop" and len(answer.arrivals) == 4
    assert answer.begin < answer.arrivals[0] <= answer.arrivals[-1] < answer.end


def test_the_client_notes_a_piece_when_it_comes(monkeypatch):
    """A clock that moves by one at each look, and a server that sends the next piece after that."""
    looked, now = asyncio.Queue(), itertools.count()

    def clock() -> float:
        looked.put_nowait(None)
        return float(next(now))

    def chunk(**fields: Any) -> bytes:
        event = f"data: {json.dumps(fields)}\n\n".encode()
        return b"%x\r\n%s\r\n" % (len(event), event)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await looked.get()
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in ("one", " two", " three"):
            writer.write(chunk(choices=[{"delta": {"content": piece}}]))
            await looked.get()
        last = {"delta": {}, "finish_reason": "stop"}
        writer.write(chunk(choices=[last], usage={"completion_tokens": 3}) + b"0\r\n\r\n")
        writer.close()

    async def run() -> Answer:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await ask(server.sockets[0].getsockname()[1], {})

    monkeypatch.setattr(client, "time", SimpleNamespace(perf_counter=clock))
    answer = asyncio.run(run())
    assert answer.text == "one two three" and answer.arrivals == (1, 2, 3)
    assert (answer.begin, answer.first_token, answer.gaps, answer.end) == (0, 1, [1, 1], 5)


def test_requests_go_out_as_others_end(echo):
    bodies = [body(f"!slow {number}") for number in range(6)]
    answers = asyncio.run(together(echo.port, bodies, 2))
    assert [answer.text for answer in answers] == [f"!slow {number}" for number in range(6)]
    moments = sorted(
        [(answer.begin, 1) for answer in answers] + [(answer.end, -1) for answer in answers]
    )
    opened = [sum(change for _, change in moments[: i + 1]) for i in range(len(moments))]
    assert max(opened) == 2


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"max_tokens": 0}, "status 400"),
        ({"messages": [{"role": "user", "content": "!fail 2 3 4"}]}, "not finite"),
        ({"stream_options": None}, "without usage"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(echo, sent, says):
    with pytest.raises(RequestFailed, match=says):
        asyncio.run(ask(echo.port, body("one two three") | sent))


# Servers


def test_the_clock_of_a_process_has_its_children():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n{burn}"
    script += (
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\nprint(flush=True)\ninput()"
    )
    sleeps = f"{burn}\nprint(flush=True)\ntime.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", script, sleeps],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            for _ in range(2):  # of the parent, and of the child that goes on
                assert process.stdout.readline()
            seconds = servers.tree_cpu_seconds(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert 0.85 < seconds < 5  # three times 0.3, in steps of 10 ms, and starting interpreters


def test_a_server_that_does_not_start_says_why():
    command = [sys.executable, "-c", "import sys; sys.exit('no model at {port}')", "{port}"]
    with pytest.raises(servers.StartFailed, match=r"(?s)thing does not start.*no model at \d+"):
        servers.Server("thing", command, {})


def test_a_server_is_ready_when_it_says_so_and_is_ended():
    script = (
        "import sys, http.server as h, time\nbegin = time.time()\nclass H(h.BaseHTTPRequestHandler):\n"
        " def do_GET(self):\n  self.send_response(200 if time.time() > begin + 0.5 else 503)\n"
        "  self.end_headers()\nh.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()"
    )
    begin = time.monotonic()
    with servers.Server("thing", [sys.executable, "-c", script, "{port}"], {}) as server:
        assert time.monotonic() - begin > 0.5 and server.cpu_seconds() > 0
    assert servers.tree_cpu_seconds(server._process.pid) == 0


# Requests


def test_no_picture_and_no_prompt_is_asked_twice():
    source = Source(0)
    asked = [*source.distinct(5), *source.same(8), source.large(4), *source.distinct(5, 64)]
    pictures = [request.picture for request in asked]
    assert len(set(pictures)) == 12 and len(set(pictures[5:13])) == 1
    assert len({request.text for request in asked[5:13]}) > 3
    texts = [source.words(100, lambda text: len(text.split())) for _ in range(2)]
    assert texts[0][:40] != texts[1][:40] and all(80 < len(t.split()) <= 100 for t in texts)


def test_both_servers_are_asked_for_the_same():
    ours = requests.our_body("m", Request("Why?", b"png", 64))
    peer = requests.peer_body("m", Request("Why?", b"png", 64), {"eos_token_id": [1, 2]})
    config = json.loads(peer.pop("generation_config"))
    assert config == {"eos_token_id": [1, 2], "min_new_tokens": 64, "max_new_tokens": 64}
    assert ours.pop("min_tokens") == 64 and ours.pop("stream_options") == {"include_usage": True}
    assert ours == peer and ours["max_tokens"] == 64 and ours["temperature"] == 0
    short = Request("Why?", b"png")
    assert requests.peer_body("m", short, {}) | {"stream_options": {"include_usage": True}} == (
        requests.our_body("m", short)
    )
    assert requests.our_body("m", Request("Why?", None, 64, with_stops=True))["ignore_eos"] is True


# Rounds


class Clockwork:
    """Answers at once, as if each answer took so many seconds."""

    def __init__(self, name: str, seconds: float, text: str = "yes", tokens: int = 0) -> None:
        self.name, self._seconds, self._cpu = name, seconds, 0.0
        self._text, self._tokens = text, tokens
        self.asked: list[Request] = []

    def answer(self, asked: Sequence[Request], streams: int) -> list[Answer]:
        self.asked += asked
        self._cpu += self._seconds * len(asked)
        tokens = self._tokens or LONGEST
        ends = (self._seconds / 2, self._seconds)
        return [Answer(self._text, tokens, 0.0, self._seconds, ends, "length") for _ in asked]

    def cpu_seconds(self) -> float:
        return self._cpu


def long_workload(count: int = 4) -> load.Workload:
    return load.Workload(f"{LONGEST} tokens", lambda s, n: s.distinct(n, LONGEST), {8: count})


def test_a_row_has_every_round_and_how_many_times_more_the_peer_takes():
    mine, peer = Clockwork("mine", 0.1), Clockwork("peer", 0.5)
    row = load.row(long_workload(), 8, [mine, peer], Source(0), 3, Budget())
    assert mine.asked == peer.asked and len({request.picture for request in mine.asked}) == 12
    first, second = row["contenders"]
    assert first["cpu_s"]["median"] == pytest.approx(0.1) and len(first["cpu_s"]["rounds"]) == 3
    assert second["cpu_s_times_ours"]["median"] == pytest.approx(5)
    assert second["token_s"]["median"] == pytest.approx(0.25 / (LONGEST - 1), rel=1e-3)
    assert second["first_token_s_times_ours"]["median"] == pytest.approx(5)
    assert "cpu_s_times_ours" not in first


def test_an_answer_of_another_length_is_no_figure():
    with pytest.raises(RuntimeError, match="peer: an answer has 63 tokens, not 64"):
        contenders = [Clockwork("mine", 0.1), Clockwork("peer", 0.5, tokens=63)]
        load.row(long_workload(), 8, contenders, Source(0), 1, Budget())


def test_nothing_is_timed_that_answers_otherwise():
    mine, other = Clockwork("mine", 0.1), Clockwork("peer", 0.5)
    assert agreement.agreement([mine, other], Source(0), 4)["equal"] == {"peer": 4}
    with pytest.raises(agreement.Disagreement, match="'yes' and 'no'"):
        agreement.agreement([mine, Clockwork("peer", 0.5, "no")], Source(0), 4)


def test_a_percentile_lies_among_the_values():
    assert load.percentile_99(list(range(101))) == 99 and load.percentile_99([1.0, 1.0]) == 1.0


# Goals and tables


def sample_run() -> dict[str, Any]:
    """A document as serve.py writes it, from contenders that take no time."""
    rows = [
        load.row(
            load.Workload(workload.name, workload.make, dict.fromkeys(workload.counts, 2)),
            streams,
            [Clockwork("mllama serve", 0.1), Clockwork("transformers serve", 0.6)],
            Source(0),
            1,
            Budget(),
        )
        | {"state": {"before": {"load": 1.0}, "after": {"load": 1.5}}}
        for workload in load.workloads(quick=False)
        for streams in workload.counts
    ]
    wide = {
        "dtype": "bfloat16",
        "layers": 5,
        "threads": 2,
        "instruction_set": "avx512",
        "is_kept_to_avx2": False,
        "multiplies_bfloat16": True,
        "tokens_per_s": {"1": {"median": 10.0}, "8": {"median": 55.0}},
        "times_one_stream": {"median": 5.5, "min": 5.5, "max": 5.5},
    }
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "command": "python -m benchmarks.serve",
        "dtype": "float32",
        "server_threads": 1,
        "machine": serve.machine.describe(serve.torch.device("cpu")),
        "versions": serve.versions(),
        "commit": "abc",
        "dirty": False,
        "agreement": {"peers": {"answers": 24, "equal": {"transformers serve": 24}}},
        "peers": rows,
        "engine": [],
        "arrivals": [],
        "wide": [wide],
    }


def test_goals_are_those_that_were_measured():
    run = sample_run()
    found = {row["goal"]: row for row in goals.judged(run)}
    assert not any("in-process" in goal or "percentile" in goal or "AVX2" in goal for goal in found)
    long_8 = found[f"{LONGEST} tokens, 8 streams, against `transformers serve`: processor time"]
    long_32 = found[f"{LONGEST} tokens, 32 streams, against `transformers serve`: processor time"]
    assert long_8["measured"] == pytest.approx(6) and long_8["reached"]
    assert not long_32["reached"] and long_32["target"] == ">= 7"
    run["engine"] = [{"contenders": [{}, {"wall_s_times_ours": {"median": 0.9}}]}]
    run["arrivals"] = [{"p99_of_bound": 1.3}]
    judged = {row["goal"]: row["reached"] for row in goals.judged(run)}
    assert len(judged) == len(found) + 2 and list(judged.values()).count(False) >= 2
    assert all(judged[goal] is ("in-process" in goal) for goal in set(judged) - set(found))


def test_the_page_has_every_row():
    run = sample_run()
    run["goals"] = goals.judged(run)
    page = tables.page(run)
    assert page.count("| transformers serve |") == len(run["peers"])
    assert "24 of 24 answers of transformers serve" in page and "1.0 to 1.5 on" in page
    assert "6.00x (6.00 to 6.00)" in page and "5.50x" in page and "Not part of this run" in page


def test_the_committed_page_is_what_the_file_says():
    if not serve.OUTPUT.exists():
        pytest.skip("no run is committed")
    assert serve.OUTPUT.with_suffix(".md").read_text() == tables.page(
        json.loads(serve.OUTPUT.read_text())
    )


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--threads", "0"], ["--output", "."], ["--dtype", "float64"]]
)
def test_misuse_is_told_before_anything_starts(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        serve.parse(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_a_quick_run_writes_nothing_unless_told_where():
    assert serve.parse(["--quick"]).output is None and serve.parse([]).output == serve.OUTPUT
    assert serve.parse([]).what == list(PARTS) and serve.parse(["wide"]).what == ["wide"]


# All of it, in seconds


def small_effort() -> Effort:
    few = load.Workload("short answers", Source.distinct, {2: 2})
    return Effort(1, [few], 2, 24, [("float32", False)], 1, 4, 1)


@pytest.mark.parametrize(
    "part",
    [
        "engine",
        "arrivals",
        *(pytest.param(part, marks=pytest.mark.full) for part in ("peers", "wide")),
    ],
)
def test_a_part_is_measured(part):
    run = Run(checkpoint_path(), "float32", 1, 0, small_effort(), Budget())
    run.measure(part)
    (row,) = run.document[part]
    if part == "peers":
        assert run.document["agreement"]["peers"]["equal"] == {"transformers serve": 2}
        assert row["contenders"][1]["cpu_s_times_ours"]["median"] > 0
    elif part == "wide":
        assert row["times_one_stream"]["median"] > 1
    elif part == "engine":
        assert [one["name"] for one in row["contenders"]] == [
            "mllama serve",
            "the engine in-process",
        ]
        assert all(one["cpu_s"]["median"] > 0 for one in row["contenders"])
        assert run.document["agreement"]["engine"]["equal"] == {"the engine in-process": 2}
    else:
        assert row["alone_ms"]["count"] == row["arriving_ms"]["count"] == 8 * 23
        assert row["chunk_ms"] > 0 and row["picture_ms"] > 0 and row["p99_of_bound"] > 0
