"""Jobs in processes of their own, for what came with a checkpoint and could take all time and memory.

A job is a Python file (see `confined_worker`) that runs in a child of this interpreter, which lives on
between calls. The child has no environment, no file but the channel to its parent, can open none and start
no process, and has the memory it was given. The parent keeps the time: a call that takes longer ends with
its child. What a child says is not believed either: it is JSON and text, both of bounded length.
"""

from __future__ import annotations

import atexit
import json
import marshal
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("confined_worker.py")
_MOST = 8  # children of a kind at a time; further calls wait
_KEPT = 4  # of those that wait for the next call
_START_SECONDS = 60.0
_LONGEST_VALUE = 2**20
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
# What an interpreter may need to start; the child sees nothing else of the environment.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class ConfinedError(Exception):
    """A job that went beyond a limit, or whose process ended.

    Attributes:
        limit: "seconds", "memory", "answer" or "process".
    """

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


class WorkerUnavailable(RuntimeError):
    """A child process cannot be started; the message says why."""


class _Worker:
    """One child, and the channel to it."""

    def __init__(self, job: Path, memory: int, paths: Sequence[str]) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise WorkerUnavailable(
                "templates and tokenizers of a checkpoint run in a process of their own, and this "
                f"interpreter cannot start one: sys.executable is {sys.executable!r}"
                + (" of a frozen program" if sys.executable else "")
            )
        self.memory, self.calls = memory, 0
        ours, theirs = socket.socketpair()
        try:
            # Isolated and without site: nothing of the user's directory or environment is run.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-B", "-W", "ignore"),
                    *(str(_WORKER), str(job), str(memory), *paths),
                ],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={n: os.environ[n] for n in _KEPT_VARIABLES if n in os.environ},
                start_new_session=True,  # the terminal's Ctrl-C is for the parent only
            )
        except (OSError, ValueError) as error:
            ours.close()
            raise WorkerUnavailable(f"{sys.executable} cannot be started: {error}") from None
        finally:
            theirs.close()
        self._channel = ours
        try:
            value, _ = self._receive(time.monotonic() + _START_SECONDS, 0)
        except (ConfinedError, TimeoutError) as error:
            self.end()
            raise WorkerUnavailable(
                f"{sys.executable} was started and does not answer as a Python interpreter: {error}"
            ) from None
        except BaseException:
            self.end()
            raise
        if value != {"ready": True}:
            self.end()
            raise WorkerUnavailable(f"{job.name} cannot run in a process of its own: {value}")

    def call(self, request: Any, seconds: float, longest: int) -> tuple[Any, str]:
        """Raises: ConfinedError, after which the worker is of no use."""
        self.calls += 1
        deadline = time.monotonic() + seconds
        data = marshal.dumps((seconds, request))
        try:
            self._send(len(data).to_bytes(8, "little") + data, deadline)
            value, text = self._receive(deadline, longest)
        except TimeoutError:
            raise ConfinedError("seconds", f"it took more than {seconds:.3g} s") from None
        if isinstance(value, dict) and "ended" in value:
            raise ConfinedError("memory", f"it needed more than {self.memory} bytes of memory")
        return value, text

    def end(self) -> None:
        """Kill the child and take its status, so that nothing of it is left."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """The child belongs to the process that this one was forked from."""
        self._channel.close()
        self._process.returncode = 0

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        try:
            while view:
                self._channel.settimeout(_left(deadline))
                view = view[self._channel.send(view[: 1 << 20], _NO_SIGNAL) :]
        except TimeoutError:
            raise
        except OSError:
            raise self._ended() from None

    def _receive(self, deadline: float, longest: int) -> tuple[Any, str]:
        head = self._read(12, deadline)
        sizes = (
            int.from_bytes(head[:4], "little"),
            int.from_bytes(head[4:], "little"),
        )
        # A character has at most four bytes.
        if sizes[0] > _LONGEST_VALUE or sizes[1] > 4 * longest:
            raise ConfinedError(
                "answer",
                f"its answer has {sum(sizes)} bytes; at most {longest} characters are read",
            )
        value, text = (self._read(size, deadline) for size in sizes)
        try:
            return json.loads(value), text.decode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            raise ConfinedError("process", "its answer cannot be read") from None

    def _read(self, count: int, deadline: float) -> bytearray:
        data = bytearray(count)
        view, filled = memoryview(data), 0
        while filled < count:
            self._channel.settimeout(_left(deadline))
            try:
                got = self._channel.recv_into(view[filled:])
            except TimeoutError:
                raise
            except OSError:
                got = 0
            if not got:
                raise self._ended()
            filled += got
        return data

    def _ended(self) -> ConfinedError:
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            status = None
        how = f"by signal {-status}" if status and status < 0 else f"with status {status}"
        return ConfinedError("process", f"its process ended {how}")


class Workers:
    """Children that run one job, started when they are needed and kept for the next call.

    Threads may call at the same time. A process that is forked from this one starts its own.

    Args:
        job: a Python file with the function `answer`.
        paths: gives the folders for sys.path, of packages that the job imports; asked at each start.
    """

    def __init__(self, job: Path, paths: Callable[[], Sequence[str]]) -> None:
        self._job, self._paths = job, paths
        self._reset()
        _ALL.append(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_MOST)
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()

    def call(self, request: Any, *, seconds: float, memory: int, longest: int) -> tuple[Any, str]:
        """The answer of the job: a JSON value and a text.

        Args:
            request: dicts, lists, strings, numbers, None: what `marshal` writes.
            seconds: of time for this call.
            memory: bytes that the child may take beyond those of its start.
            longest: characters of the text.
        Raises: ConfinedError for what goes beyond a limit; WorkerUnavailable when no child can be started.
        """
        if self._pid != os.getpid():
            self.forget()
        with self._places:
            while True:
                worker = self._taken(memory)
                try:
                    answer = worker.call(request, seconds, longest)
                except ConfinedError as error:
                    self._end(worker)
                    # What calls before this one left in the child is not this one's fault.
                    if worker.calls > 1 and error.limit in ("memory", "process"):
                        continue
                    raise
                except BaseException:  # Ctrl-C: its answer would be the next call's
                    self._end(worker)
                    raise
                self._put_back(worker)
                return answer

    def close(self) -> None:
        """End all children."""
        if self._pid == os.getpid():
            for worker in list(self._alive):
                self._end(worker)
            self._idle.clear()

    def forget(self) -> None:
        """Begin anew in a process that was forked: the children are its parent's."""
        for worker in self._alive:
            worker.forget()
        self._reset()

    def _taken(self, memory: int) -> _Worker:
        with self._lock:
            found = next((w for w in reversed(self._idle) if w.memory == memory), None)
            if found is not None:
                self._idle.remove(found)
                return found
        worker = _Worker(self._job, memory, self._paths())
        with self._lock:
            self._alive.add(worker)
        return worker

    def _put_back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)
            surplus = self._idle.pop(0) if len(self._idle) > _KEPT else None
        if surplus is not None:
            self._end(surplus)

    def _end(self, worker: _Worker) -> None:
        worker.end()
        with self._lock:
            self._alive.discard(worker)


def package_paths(*names: str) -> list[str]:
    """The folders that these packages are imported from."""
    found = [find_spec(name) for name in names]
    return list(dict.fromkeys(str(Path(s.origin).parents[1]) for s in found if s and s.origin))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


_ALL: list[Workers] = []


@atexit.register
def _close_all() -> None:
    for workers in _ALL:
        workers.close()


def _forget_all() -> None:
    for workers in _ALL:
        workers.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
