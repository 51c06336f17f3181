"""Servers as processes on this machine, and the processor time that they and their children have taken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.machine import ROOT

START_SECONDS, END_SECONDS = 300.0, 30.0
_TICKS = os.sysconf("SC_CLK_TCK")


class StartFailed(RuntimeError):
    """A server that ended, or was not ready in time; the message has the end of what it wrote."""


class Server:
    """A process that answers on a port, from the time it is ready until it is closed.

    Args:
        name: for messages.
        command: its words; `{port}` stands for the port.
        variables: of the environment, beside those there are.
    Raises: StartFailed.
    """

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name, self._reserved = name, _reserved_port()
        self.port: int = self._reserved.getsockname()[1]
        self.command = [word.format(port=self.port) for word in command]
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for the benchmark, which ends it
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def cpu_seconds(self) -> float:
        """User and system time so far, of its children too, in steps of 10 ms."""
        return tree_cpu_seconds(self._process.pid)

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
            try:
                self._process.wait(END_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        self._log.close()
        self._reserved.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                said = self._log.read()[-2000:].decode(errors="replace")
                raise StartFailed(f"{self.name} does not start: {' '.join(self.command)}\n{said}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/health", timeout=5
            ) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def environment(threads: int) -> dict[str, str]:
    """In which a server computes with so many threads, and asks nobody outside of this machine."""
    count = str(threads)
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}


def ours(folder: Path, dtype: str, threads: int) -> Server:
    """`mllama serve`, which calls the model as the peer does: by its folder."""
    words = ["--model", str(folder), "--served-model-name", str(folder), "--dtype", dtype]
    command = [sys.executable, "-m", "mllama", "serve", *words, "--device", "cpu"]
    return Server("mllama serve", [*command, "--port", "{port}"], environment(threads))


def peer(folder: Path, dtype: str, threads: int) -> Server:
    """`transformers serve` of the installed release."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    words = ["--device", "cpu", "--dtype", dtype, "--host", "127.0.0.1", "--port", "{port}"]
    return Server("transformers serve", [*command, *words], environment(threads))


def tree_cpu_seconds(pid: int) -> float:
    """Of a process, its descendants, and those of them that have ended and were waited for."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended since
            continue
        number = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(number)
        ticks[number] = sum(map(int, fields[11:15]))
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        total += ticks.get(one, 0)
        waiting += children.get(one, ())
    return total / _TICKS


def _reserved_port() -> socket.socket:
    """Bound to a port that the system gives nobody else meanwhile, and where a server may listen."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", 0))
    return one
