"""`mllama serve` on the demo model in a process of its own, forked from one that has imported it all."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from free_ports import reserved

from mllama import cli
from mllama.commands import serve
from mllama.engine.runner import Runner

CHAT = "/v1/chat/completions"

# Forks a process that has imported torch and the server, which alone takes seconds.
NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload([__name__, "mllama.server.app", "mllama.engine.engine"])


def _ranks(size: int, port: int) -> list[dict[str, str]]:
    """What the environment says to each rank, as torchrun would; of one process nothing.

    Args:
        port: where they meet.
    """
    if size == 1:
        return [{}]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, **meeting} for rank in range(size)
    ]


def _run(
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    limits: dict[str, Any],
    sabotage: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    settings_of = serve.settings_of
    serve.settings_of = lambda *a: replace(settings_of(*a), **limits)
    if sabotage is not None:
        sabotage()
    sys.exit(cli.main(["serve", "--device", "cpu", *arguments]))


def steps_that_can_be_held() -> None:
    """For `Child.held`."""
    go, launch = threading.Event(), Runner.launch
    go.set()
    signal.signal(signal.SIGUSR1, lambda *_: go.clear())
    signal.signal(signal.SIGUSR2, lambda *_: go.set())

    def held(self: Runner, plan: Any) -> Any:
        go.wait()
        return launch(self, plan)

    Runner.launch = held


def slow_steps() -> None:
    """An answer of some hundred tokens takes longer than a test needs to look at it."""
    launch = Runner.launch

    def slow(self: Runner, plan: Any) -> Any:
        time.sleep(0.05)
        return launch(self, plan)

    Runner.launch = slow


class Child:
    """A server that is ready.

    Args:
        log: where its words go; other processes may have written there.
        limits: of its settings, in the place of those that no option sets.
        sabotage: called in the process before the command: a function of a module.
        ranks: that it runs on, each a process; by default what MLLAMA_TEST_RANKS says, or one.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        port: int = 0,
        limits: dict[str, Any] | None = None,
        sabotage: Callable[[], None] | None = None,
        ranks: int | None = None,
    ) -> None:
        self._log, self._start = log, log.stat().st_size if log.exists() else 0
        words = ["--port", str(port), *arguments]
        size = ranks or int(os.environ.get("MLLAMA_TEST_RANKS", "1"))
        self._kept = ExitStack()
        meeting = self._kept.enter_context(reserved())
        self._ranks = [
            NURSERY.Process(target=_run, args=(words, log, rank, limits or {}, sabotage))
            for rank in _ranks(size, meeting)
        ]
        for process in self._ranks:
            process.start()
        self._process, *self.others = self._ranks
        try:
            self.url = self._address()
        except BaseException:
            self.close()
            raise
        self.port = int(self.url.rsplit(":", 1)[1])

    def _address(self) -> str:
        end = time.monotonic() + 600
        while " ready: " not in self.log:
            assert self._process.is_alive() and time.monotonic() < end, self.log
            time.sleep(0.05)
        found = re.search(r"listening on (http://\S+)/;", self.log)
        assert found is not None
        return found[1]

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def log(self) -> str:
        data = self._log.read_bytes() if self._log.exists() else b""
        return data[self._start :].decode()

    def wait(self, seconds: float = 120) -> int | None:
        """The exit code; None where it is still running. Other ranks have ended with it."""
        self._process.join(seconds)
        for other in self.others if self._process.exitcode is not None else ():
            other.join(10)
            assert other.exitcode is not None, self.log
        return self._process.exitcode

    def close(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join()
        self._kept.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step is made meanwhile; of a server whose sabotage is `steps_that_can_be_held`."""
        self.signal(signal.SIGUSR1)
        try:
            yield
        finally:
            self.signal(signal.SIGUSR2)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ask(self, content: Any, **fields: Any) -> httpx2.Response:
        """Post a chat of one message."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return httpx2.post(self.url + CHAT, json=body, timeout=300)

    def send(self, content: Any, **fields: Any) -> socket.socket:
        """As ask(), on a connection from which nothing is read."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = self.connect()
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=300)

    def health(self) -> int:
        """The status of /health."""
        return httpx2.get(self.url + "/health", timeout=300).status_code

    def metrics(self) -> dict[str, float]:
        """Their values by name, with labels as they are written."""
        lines = httpx2.get(self.url + "/metrics", timeout=300).text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("mllama_"): float(value) for name, value in pairs}

    def open_answers(self) -> float:
        """Answers that the engine makes or that wait for their turn."""
        found = self.metrics()
        return found["answers_running"] + found["answers_waiting"]

    def memory(self) -> int:
        """Bytes that it has in memory."""
        text = Path(f"/proc/{self.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def child(log: Path, *arguments: str, **options: Any) -> Iterator[Child]:
    made = Child(log, *arguments, **options)
    try:
        yield made
    finally:
        made.close()
