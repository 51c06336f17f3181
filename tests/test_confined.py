"""Jobs in children: limits of time, memory and answers; threads, forks and exits leave nothing behind."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from confinement import confined

from mllama import confined as module
from mllama.confined import ConfinedError, Workers, WorkerUnavailable

ROOT = Path(__file__).parents[1]
MIB = 2**20
JOB = """
import os, time, socket, sys, ctypes, resource
def answer(request):
    do, value = request["do"], request.get("value")
    if do == "echo":
        return {"value": None, "pid": os.getpid()}, value
    if do == "spin":
        while True: pass
    if do == "count":
        return 9 ** 9 ** 8, ""
    if do == "take":
        return len(bytearray(value)), ""
    if do == "exit":
        os._exit(value)
    if do == "kill":
        os.kill(os.getpid(), value)
    if do == "recurse":
        return eval("(" * 150 + ")" * 150), ""
    if do == "big":
        return "x" * value, ""
    if do == "raw":
        os.write(0, value); time.sleep(60)
    if do == "state":
        tried = {}
        for name, call in {
            "open": lambda: open("/etc/passwd"),
            "write": lambda: open("/tmp/confined_job", "w"),
            "socket": lambda: socket.socket(),
            "pipe": lambda: os.pipe(),
            "fork": lambda: os.fork(),
        }.items():
            try:
                call(); tried[name] = "done"
            except OSError as error:
                tried[name] = type(error).__name__
        files = [n for n in range(64) if _is_open(n)]
        return {"env": dict(os.environ), "cwd": os.getcwd(), "tried": tried, "files": files,
                "modules": "mllama" in sys.modules or "torch" in sys.modules}, ""
def _is_open(n):
    try: os.fstat(n); return True
    except OSError: return False
"""
LIMITS = {"seconds": 20.0, "memory": 64 * MIB, "longest": 1000}


@pytest.fixture
def workers(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    made = Workers(tmp_path / "job.py", list)
    yield made
    made.close()
    module._ALL.remove(made)


def pid(workers, **limits):
    value, _ = workers.call({"do": "echo", "value": ""}, **LIMITS | limits)
    return value["pid"]


def until_it_spins(pid):
    """Waits until a process computes."""

    def spent():  # in hundredths of a second
        return sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )

    before = spent()
    while spent() < before + 5:
        time.sleep(0.01)


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_texts_arrive_as_they_are(workers):
    for text in ("", "a\0b", "\ud800 \udfff \U0001f600", "你" * 333, "x" * 1000):
        assert workers.call({"do": "echo", "value": text}, **LIMITS)[1] == text
    assert len({pid(workers) for _ in range(5)}) == 1
    text = "é" * 10**6
    assert workers.call({"do": "echo", "value": text}, **LIMITS | {"longest": 10**6})[1] == text


@pytest.mark.parametrize(
    ("request_", "limit", "text"),
    [
        ({"do": "spin"}, "seconds", r"more than 0\.5 s"),
        ({"do": "count"}, "seconds", r"more than 0\.5 s"),
        ({"do": "take", "value": 80 * MIB}, "memory", "more than 67108864 bytes of memory"),
        ({"do": "exit", "value": 3}, "process", "its process ended with status 3"),
        ({"do": "kill", "value": int(signal.SIGSEGV)}, "process", "its process ended by signal 11"),
        ({"do": "echo", "value": "é" * 2001}, "answer", "at most 1000 characters"),
        ({"do": "big", "value": 2**20}, "answer", "at most 1000 characters"),
        ({"do": "nothing"}, "process", "its process ended with status 1"),
        ({"do": "raw", "value": b"\xff" * 12}, "answer", "at most 1000"),
        ({"do": "raw", "value": b"\x05" + b"\0" * 11 + b"[[[[["}, "process", "cannot be read"),
        ({"do": "raw", "value": b"\0\0"}, "seconds", r"more than 0\.5 s"),
        (
            {"do": "raw", "value": b"\2\0\0\0\1" + b"\0" * 7 + b"{}\xff"},
            "process",
            "cannot be read",
        ),
        (
            {"do": "raw", "value": (90_000).to_bytes(12, "little") + b"[" * 90_000},
            "process",
            "cannot be read",
        ),
    ],
    ids=str,
)
def test_what_goes_beyond_a_limit_ends_the_process_and_not_the_next_call(
    workers, request_, limit, text
):
    before = pid(workers)
    seconds = 0.5 if limit == "seconds" else 600.0  # which are not waited for
    with pytest.raises(ConfinedError, match=text) as caught:
        workers.call(request_, **LIMITS | {"seconds": seconds})
    assert caught.value.limit == limit
    assert not is_there(before) and pid(workers) != before


def test_a_child_has_nothing_but_its_channel(workers, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    value, _ = workers.call({"do": "state"}, **LIMITS)
    assert value["env"].keys() <= {"LC_CTYPE", *module._KEPT_VARIABLES}
    assert value["cwd"] == "/" and value["files"] == [0, 1, 2] and not value["modules"]
    refused = {name for name, what in value["tried"].items() if what == "OSError"}
    assert refused >= {"open", "write", "socket", "pipe"}
    assert not Path("/tmp/confined_job").exists()


def test_memory_of_earlier_calls_is_not_blamed_on_the_next(workers, tmp_path):
    (tmp_path / "keeps.py").write_text(
        "kept = []\ndef answer(n):\n    kept.append(bytearray(n)); return len(kept), ''"
    )
    keeps = Workers(tmp_path / "keeps.py", list)
    try:
        counts = [keeps.call(24 * MIB, **LIMITS)[0] for _ in range(6)]
    finally:
        keeps.close()
        module._ALL.remove(keeps)
    assert counts[:2] == [1, 2] and set(counts) == {1, 2}


def test_threads_call_at_the_same_time(workers):
    results, errors = [], []

    def work(number):
        try:
            for i in range(20):
                text = f"{number} {i}"
                assert workers.call({"do": "echo", "value": text}, **LIMITS)[1] == text
            with pytest.raises(ConfinedError):
                workers.call({"do": "spin"}, **LIMITS | {"seconds": 0.1})
            results.append(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors and sorted(results) == list(range(12))
    assert len(workers._alive) <= module._KEPT and len(workers._idle) <= module._KEPT


def _in_a_fork(workers, queue):
    queue.put((pid(workers), os.getppid()))


@pytest.mark.parametrize("daemon", [True, False])
def test_a_fork_starts_its_own(workers, daemon):
    ours = pid(workers)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(workers, queue), daemon=daemon)
    process.start()
    theirs, parent = queue.get(timeout=300)
    process.join(300)
    assert process.exitcode == 0 and parent == os.getpid()
    assert theirs != ours and pid(workers) == ours  # its channel was not used by the fork
    assert gone(theirs)


def gone(pid, seconds=60):
    """Whether a process ends soon; one that nobody has taken the status of yet counts."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_that_somebody_killed_is_replaced(workers):
    before = pid(workers)
    os.kill(before, signal.SIGKILL)
    assert pid(workers) != before


def test_a_call_that_is_interrupted_leaves_no_answer_for_the_next(workers):
    before = pid(workers)

    def interrupt(*_):
        raise KeyboardInterrupt

    def send():
        until_it_spins(before)
        os.kill(os.getpid(), signal.SIGALRM)

    old = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=send)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            workers.call({"do": "spin"}, **LIMITS | {"seconds": 600.0})
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, old)
    assert not is_there(before)
    assert workers.call({"do": "echo", "value": "next"}, **LIMITS)[1] == "next"


def test_few_children_are_kept(workers):
    pids = [pid(workers, memory=(64 + n) * MIB) for n in range(module._KEPT + 2)]
    assert [is_there(p) for p in pids] == [False] * 2 + [True] * module._KEPT
    workers.close()
    assert not any(map(is_there, pids))


def test_children_end_with_their_parent(tmp_path):
    """At exit, by a signal, in the middle of a call: no child stays, nothing is written."""
    (tmp_path / "job.py").write_text(JOB)
    script = """
        import os, signal, sys, threading, time
        from pathlib import Path
        from confined import Workers
        workers = Workers(Path(sys.argv[1]), list)
        limits = {"seconds": 20.0, "memory": 2**26, "longest": 1000}
        pid = workers.call({"do": "echo", "value": ""}, **limits)[0]["pid"]
        print(pid, flush=True)
        if sys.argv[2] == "busy":
            busy = lambda: workers.call({"do": "spin"}, **limits)
            threading.Thread(target=busy, daemon=True).start()
            time.sleep(0.5)
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for how in ("idle", "busy", "killed"):
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), tmp_path / "job.py", how],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT / "mllama")},
        )
        assert ended.returncode == (-signal.SIGKILL if how == "killed" else 0), ended.stderr
        assert ended.stderr == "" and gone(int(ended.stdout))


def test_the_clock_of_an_orphan(workers):
    """A child whose parent is gone in the middle of a call ends by its own limit of time."""
    code = """
        import os, signal, sys, threading, time
        from pathlib import Path
        from confined import Workers
        workers = Workers(Path(sys.argv[1]), list)
        limits = {"memory": 2**26, "longest": 1000}
        pid = workers.call({"do": "echo", "value": ""}, seconds=60.0, **limits)[0]["pid"]
        print(pid, flush=True)
        def end():
            until_it_spins(pid)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=end).start()
        workers.call({"do": "spin"}, seconds=3.0, **limits)
    """
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            inspect.getsource(until_it_spins) + textwrap.dedent(code),
            workers._job,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT / "mllama")},
    )
    assert ended.returncode == -signal.SIGKILL and gone(int(ended.stdout))


@pytest.mark.parametrize(
    ("executable", "text"),
    [
        ("", "sys.executable is ''"),
        ("/nowhere/python", "cannot be started: .*No such file"),
        ("/bin/true", "was started and does not answer as a Python interpreter"),
    ],
)
def test_an_interpreter_that_cannot_be_started(workers, monkeypatch, executable, text):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(WorkerUnavailable, match=text):
        pid(workers)


def test_a_job_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ALL", [])
    (tmp_path / "job.py").write_text("import nothing_of_this_name")
    with pytest.raises(WorkerUnavailable, match="nothing_of_this_name"):
        pid(Workers(tmp_path / "job.py", list))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(WorkerUnavailable, match="of a frozen program"):
        pid(Workers(tmp_path / "job.py", list))


def test_children_work_where_memory_is_limited_already(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    ended = confined(
        """
        import sys
        from pathlib import Path
        from confined import ConfinedError, Workers
        workers = Workers(Path(sys.argv[1]), list)
        limits = {"seconds": 20.0, "memory": 2**33, "longest": 1000}
        assert workers.call({"do": "echo", "value": "x"}, **limits)[1] == "x"
        try:
            workers.call({"do": "take", "value": 2**32}, **limits)
        except ConfinedError as error:
            print(error.limit)
        """,
        tmp_path / "job.py",
        mebibytes=1000,
        PYTHONPATH=str(ROOT / "mllama"),
    )
    assert ended.kind == "ok" and ended.out.split() == ["memory"], ended
