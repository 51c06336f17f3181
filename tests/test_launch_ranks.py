"""Commands over several ranks: how those are started, what they say, and that all end when one ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mllama import cli
from mllama.commands import ranks
from mllama.demo import sample_picture
from mllama.parallel import launch as launching
from mllama.parallel.launch import Outcome, launch
from mllama.parallel.member import Member

ROOT = Path(__file__).parents[1]
MODULE = ["-m", "mllama"]
FATED = [str(ROOT / "tests" / "ranks_command.py")]
ASK = ["--prompt", "What do you see?", "--greedy", "--max-new-tokens", "24"]
# Seconds in which nothing of a command is left when one of its ranks is gone: 10, and more on a busy machine.
WITHIN = 100.0

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module", autouse=True)
def heeded() -> Iterator[None]:
    """Signals count, also where the tests run in the background of a shell, which lets SIGINT be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(*arguments: str, fate: str = "", **options: Any) -> subprocess.Popen[str]:
    alone = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**alone, "FATE": fate, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


_OF_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def told(err: str) -> list[str]:
    """Lines on stderr, without the one about the demo model."""
    return [line for line in err.splitlines() if "--model" not in line]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ranks") / "image.png"
    sample_picture(7)[0].save(path)
    return str(path)


# What ranks without torch do, and what becomes of it: they start at once.


def outcome(
    monkeypatch, tmp_path: Path, script: str, timeout: float = 60.0, settle: float = 1.0
) -> Outcome:
    """Of two ranks that run a script.

    Args:
        settle: seconds that one has to end behind the other; it is ended then, and where it waits for ever
            the test takes as long.
    """
    monkeypatch.setattr(launching, "_SETTLE", settle)
    names = "import json, os, signal, subprocess, sys, time\nrank = int(os.environ['RANK'])\n"
    names += (
        f"folder = {str(tmp_path)!r}\n"
        "def tell(name):\n"
        "    open(f'{folder}/{name}', 'w').close()\n"
        "def hear(name):\n"
        "    while not os.path.exists(f'{folder}/{name}'): time.sleep(0.05)\n"
        "    time.sleep(0.05)\n"  # more than a step of the clock that files are dated by
        "def fail(text):\n"
        "    with open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w') as file:\n"
        "        json.dump({'message': {'message': text}}, file)\n"
        "    tell(f'{rank} has failed')\n"
        "    os._exit(1)\n"
    )
    return launch([sys.executable, "-I", "-S", "-c", names + script], 2, timeout)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("", Outcome(0)),
        ("sys.exit(3)", Outcome(3)),  # as a command does that has said why
        ("rank or sys.exit(5)", Outcome(5)),
        ("fail('no such file')", Outcome(1, "no such file")),
        (
            "rank or hear('1 has failed')\nfail(f'{rank} is lost')",
            Outcome(1, "rank 1: 1 is lost"),
        ),
        (
            "rank or fail('')\nhear('0 has failed')\nfail('lost')",
            Outcome(1),
        ),  # the reader of stdout has gone
        (
            "rank and os.kill(os.getpid(), signal.SIGSEGV)\nfail('lost')",
            Outcome(1, "rank 1 was ended by SIGSEGV"),
        ),
    ],
)
def test_what_becomes_of_ranks_is_said_in_one_line(monkeypatch, tmp_path, script, expected):
    assert outcome(monkeypatch, tmp_path, script, settle=300.0) == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("rank and fail('NaN')\ntime.sleep(60)", Outcome(1, "rank 1: NaN")),
        ("rank and sys.exit(4)\ntime.sleep(60)", Outcome(4, "rank 1 ended with exit code 4")),
        ("rank and time.sleep(60)", Outcome(0)),
        (
            "rank and fail('Timed out waiting 3000ms for recv')\ntime.sleep(60)",
            Outcome(
                1,
                "rank 0 is running, but did not come to a collective within 60 s (--collective-timeout)",
            ),
        ),
    ],
)
def test_a_rank_that_goes_on_is_ended(monkeypatch, tmp_path, script, expected):
    assert outcome(monkeypatch, tmp_path, script) == expected


def test_what_is_waited_for_is_over_within_ten_seconds():
    """The ranks to end by themselves or behind a second signal, and then for SIGTERM."""
    assert max(launching._SETTLE, launching._AT_ONCE) + launching._TERMINATE < 10


def test_a_stopped_rank_is_noticed_and_ended(monkeypatch, tmp_path):
    script = "rank and os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(600)"
    expected = Outcome(1, "rank 1 is stopped for 0.5 s")
    assert outcome(monkeypatch, tmp_path, script, timeout=0.5) == expected


def test_no_process_is_left(monkeypatch, tmp_path):
    """Not one that does not heed SIGTERM, nor one that was started by a rank that was killed."""
    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "own = [os.getpid(), os.posix_spawn('/bin/sleep', ['sleep', '600'], {})]\n"
        "open(f'{folder}/{rank}', 'w').write(json.dumps(own))\n"
        "tell(f'{rank} is there')\n"
        "hear('0 is there')\n"
        "rank and os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600)"
    )
    found = outcome(monkeypatch, tmp_path, script)
    assert found.code == 1 and "rank 1 was ended by SIGKILL" in found.reason
    pids = [pid for rank in "01" for pid in json.loads((tmp_path / rank).read_text())]
    assert len(pids) == 4 and until_gone(pids) < WITHIN


@pytest.mark.parametrize(
    ("first", "signals", "expected"),
    [
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))", ["SIGTERM"], Outcome(0)),
        ("", ["SIGTERM"], Outcome(-signal.SIGTERM)),
        ("signal.signal(signal.SIGINT, lambda *_: sys.exit(130))", ["SIGINT"], Outcome(130)),
        ("signal.signal(signal.SIGTERM, lambda *_: tell('heard'))", ["SIGTERM"] * 2, Outcome(143)),
    ],
)
def test_signals_are_the_first_ranks(monkeypatch, tmp_path, first, signals, expected):
    script = (
        f"if rank == 0:\n    {first or 'pass'}\n    tell('ready')\nwhile True: time.sleep(0.05)"
    )
    numbers = [signal.Signals[name] for name in signals]

    def is_handed_on(number: int) -> bool:
        return getattr(signal.getsignal(number), "__func__", None) is launching.Watch.note

    def send() -> None:
        until(lambda: (tmp_path / "ready").exists() and is_handed_on(numbers[0]))
        os.kill(os.getpid(), numbers[0])
        for number in numbers[1:]:  # two at once would be one
            until((tmp_path / "heard").exists)
            os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    handlers = [signal.getsignal(number) for number in numbers]
    assert outcome(monkeypatch, tmp_path, script) == expected
    assert [signal.getsignal(number) for number in numbers] == handlers


def until(holds: Callable[[], Any]) -> None:
    while not holds():
        time.sleep(0.02)


def test_the_port_is_of_loopback_and_free_afterwards(monkeypatch, tmp_path):
    path = tmp_path / "port"
    script = (
        "rank or open(f'{folder}/port', 'w').write(os.environ['MASTER_PORT'])\n"
        "rank or tell('told')\n"
        "hear('seen')"
    )
    seen: list[set[str]] = []

    def look() -> None:
        until((tmp_path / "told").exists)
        try:
            seen.append(listening([os.getpid()], int(path.read_text())))
        finally:
            (tmp_path / "seen").touch()

    thread = threading.Thread(target=look)
    thread.start()
    outcome(monkeypatch, tmp_path, script)
    thread.join()
    assert seen == [{"127.0.0.1"}]
    assert listening([os.getpid()], int(path.read_text())) == set()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def listening(pids: list[int], port: int | None = None) -> set[str]:
    """The addresses at which these processes listen."""
    links = []
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.append(os.readlink(fd))
            except OSError:  # closed meanwhile
                continue
    owned = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            entry = line.split()
            address, _, number = entry[1].partition(":")
            if entry[3] == "0A" and entry[9] in owned and port in (None, int(number, 16)):
                words = [address[i : i + 8] for i in range(0, len(address), 8)]
                packed = b"".join(bytes.fromhex(word)[::-1] for word in words)
                found.add(socket.inet_ntop(family, packed))
    return found


def descendants(pid: int) -> list[int]:
    found = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [one for child in found for one in descendants(child)]


def until_gone(pids: list[int]) -> float:
    """Seconds until none is left, or as long as they may take."""
    begin = time.monotonic()
    while any(map(is_running, pids)) and time.monotonic() - begin < WITHIN:
        time.sleep(0.05)
    return time.monotonic() - begin


# Commands as they are.


def test_two_ranks_answer_as_one_process(capsys, image):
    asked = ["generate", *ASK, "--image", image, "--json"]
    both = [
        started(*MODULE, *asked, "--devices", "cpu,cpu"),
        started(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE, *asked
        ),
    ]
    assert cli.main([*asked, "--device", "cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        result = json.loads(out)  # of one rank, and nothing else
        assert {**result, "seconds": 0} == {**expected, "seconds": 0}
        assert err.count("--model") == 1


def test_wrong_arguments_are_told_once():
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = started(*run, *MODULE, "generate", "--max-new-tokens", "none")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("usage: mllama generate") == 1
    assert err.count("argument --max-new-tokens") == 1


@pytest.fixture(scope="module")
def ended(image) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of commands with a rank that meets its fate."""
    asked = ["generate", *ASK, "--image", image, "--devices", "cpu,cpu", "--collective-timeout"]
    processes = {
        fate: started(*FATED, *asked, timeout, fate=fate)
        for fate, timeout in (
            ("1:the logits are NaN", "300"),
            ("1:poor", "300"),
            ("1:SIGINT", "300"),
            ("0:sleep", "20"),
        )
    }
    return {
        fate: (process.wait(300), *process.communicate()) for fate, process in processes.items()
    }


def test_a_rank_that_fails_is_named(ended):
    code, out, err = ended["1:the logits are NaN"]
    assert code == 1 and out == "" and told(err) == ["mllama generate: rank 1: the logits are NaN"]


def test_a_rank_that_is_interrupted_alone_is_named(ended):
    code, _, err = ended["1:SIGINT"]
    assert code == 130 and told(err) == ["mllama generate: rank 1: interrupted"]


def test_a_rank_that_hangs_is_named(ended):
    code, _, err = ended["0:sleep"]
    missed = "did not come to a collective within 20 s (--collective-timeout)"
    assert code == 1 and told(err) == [f"mllama generate: rank 0 is running, but {missed}"]


def test_a_rank_without_the_room_is_refused_with_what_all_need_and_have(ended):
    code, out, err = ended["1:poor"]
    head, names, *rows = told(err)
    assert (
        code == 1 and out == "" and "rank 1 of 2 on cpu has 0.00 GB" in head and "--force" in head
    )
    assert names.split() == ["rank", "device", "needs", "has", "free"]
    assert re.fullmatch(r" +0  cpu  +[\d.]+ MB  +[\d.]+ GB", rows[0])
    assert re.fullmatch(r" +1  cpu  +[\d.]+ MB  +0\.5 MB  [\d.]+ MB are missing", rows[1])
    assert len(rows) == 2


@pytest.fixture
def talks(request) -> Iterator[list[subprocess.Popen[str]]]:
    """Conversations over two ranks that have answered once."""
    command = ["chat", "--greedy", "--max-new-tokens", "3", "--devices", "cpu,cpu"]
    made = [started(*MODULE, *command, stdin=subprocess.PIPE) for _ in range(request.param)]
    for process in made:
        process.stdin.write("Hi.\n")
        process.stdin.flush()
    for process in made:
        assert process.stdout.readline().strip(), process.stderr.read()
    yield made
    for process in made:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("talks", [3], indirect=True)
def test_nothing_is_left_of_a_conversation(talks):
    interrupted, lost, killed = talks
    everybody = {process.pid: descendants(process.pid) for process in talks}
    for process in talks:
        assert len(everybody[process.pid]) >= 2
        at = listening([process.pid, *everybody[process.pid]])
        assert at and at <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    interrupted.send_signal(signal.SIGINT)
    killed.kill()  # the launcher
    (rank,) = [pid for pid in everybody[lost.pid] if b"RANK=1" in environment(pid)]
    os.kill(rank, signal.SIGKILL)
    assert interrupted.wait(WITHIN) == 130 and told(interrupted.stderr.read())[-1].endswith(
        "interrupted"
    )
    assert lost.wait(WITHIN) == 1
    assert "mllama chat: rank 1 was ended by SIGKILL" in told(lost.stderr.read())[-1]
    for pids in everybody.values():
        assert until_gone(pids) < WITHIN


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


# What is refused, before a rank or a model is there.


@pytest.mark.parametrize(
    ("command", "devices", "named"),
    [
        ("generate", "gpu-0,gpu-0", "names cuda:0 more than once"),
        ("generate", "cpu,gpu-1", "must be of one kind"),
        ("generate", "gpu,gpu", "a GPU with its number"),
        ("generate", "cpu,", "a GPU with its number"),
        ("generate", "gpu-0,tpu-1", "a GPU with its number"),
        ("generate", "", "must name a device, got ''"),
        ("quantize", " ", "must name a device, got ' '"),
        ("finetune", "cpu,cpu", "must be one device"),
        ("quantize", "gpu-0,gpu-1", "must be one device"),
    ],
)
def test_devices_that_cannot_be_together(capsys, command, devices, named):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--devices", devices])
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_more_ranks_than_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert cli.main(["generate", *ASK, "--devices", "gpu-0,gpu-1,gpu-2,gpu-3"]) == 2
    head, _, *rows = capsys.readouterr().err.splitlines()
    assert head.endswith("4 ranks need a GPU each, and there are 2 (CUDA_VISIBLE_DEVICES=4,6)")
    assert [row.split(maxsplit=2)[2] for row in rows] == ["is there"] * 2 + ["is not there"] * 2


def test_a_timeout_of_one_device(capsys):
    assert cli.main(["generate", *ASK, "--collective-timeout", "5"]) == 2
    assert "--collective-timeout goes with several --devices" in capsys.readouterr().err


def test_layers_are_compared_on_one_device(capsys):
    options = cli.build_parser().parse_args(["verify", "--oracle", "float64"])
    options.tensor_parallel = True
    with pytest.raises(ValueError, match="--oracle float64 compares layer by layer"):
        options.run(options)


TORCHRUN = Member(rank=1, size=2, local_rank=1, local_size=2, is_ours=False)


@pytest.mark.parametrize(
    ("named", "gpus", "device"),
    [
        (None, 0, "cpu"),
        (None, 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        (None, 1, "2 ranks need a GPU each, and there are 1"),
        ("cuda:1", 2, "--device cuda:1 is one device, and torchrun has started 2 ranks"),
        (("cpu", "cpu"), 0, "--devices cpu,cpu starts ranks by itself, and torchrun has started 2"),
    ],
)
def test_devices_under_torchrun(monkeypatch, named, gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if " " not in device:
        assert ranks.device_of(TORCHRUN, named) == device
        return
    with pytest.raises(ValueError, match=re.escape(device)):
        ranks.device_of(TORCHRUN, named)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0", **_ADDRESS}, "but no LOCAL_RANK and no LOCAL_WORLD_SIZE: start"),
        ({"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "but no MASTER_ADDR and no"),
        (
            {"RANK": "x", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", **_ADDRESS},
            "must number the ranks, got RANK='x'",
        ),
        (
            {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **_ADDRESS},
            "rank 5 of 2, and 1 of 2 on this machine",
        ),
    ],
)
def test_an_environment_that_is_no_ranks(capsys, monkeypatch, environment, named):
    for name in _OF_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["info"]) == 1
    assert named in capsys.readouterr().err
