"""Starts the ranks of a command on this machine, and ends them all when one of them ends."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    SignalException,
    start_processes,
)

from mllama.parallel.member import LAUNCHER, reported

_HOST = "127.0.0.1"
_LOOK = 0.05  # seconds between two looks at the ranks
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)  # of gloo, NCCL and the store
# Seconds that the others have to end by themselves, once a rank has: a server answers those who wait.
_SETTLE = 4.0
_AT_ONCE = 1.0  # that the first has for the second signal
_TERMINATE = 2  # from SIGTERM to SIGKILL
# What a person or a system tells a command.
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a command has ended.

    Attributes:
        code: to exit with; negative for a signal that was sent here and that ended the first rank.
        reason: why it failed; empty where the command has said so, or where there is nothing to say.
    """

    code: int
    reason: str = ""


def launch(command: Sequence[str], count: int, timeout: float) -> Outcome:
    """Run a command as so many ranks, which find each other on this machine's loopback interface, until all
    have ended; when one fails the others are ended. Of the main thread.

    Signals are handed on to the first rank, which makes of them what it makes of them by itself; where a
    second one comes all are ended.

    Args:
        command: the program and its arguments, the same for all.
        timeout: seconds after which a rank that was stopped counts as one that hangs.
    """
    # Its lines tell of every signal that a rank is sent.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    before = {n: signal.getsignal(n) or signal.SIG_DFL for n in (*_HANDED_ON, signal.SIGQUIT)}
    watch = None
    with meeting_place() as port, tempfile.TemporaryDirectory(prefix="mllama-ranks-") as folder:
        try:
            context = start_processes(
                name="mllama",
                entrypoint=command[0],
                args={rank: tuple(command[1:]) for rank in range(count)},
                envs={rank: environment(rank, count, port) for rank in range(count)},
                logs_specs=DefaultLogsSpecs(folder),
            )
            watch = Watch(context, timeout)
            for number, handler in before.items():  # in the place of those that raise
                own = number in _HANDED_ON and handler != signal.SIG_IGN
                signal.signal(number, watch.note if own else handler)
            return watch.until_all_have_ended()
        except SignalException as error:  # came before there was another handler
            return Outcome(-error.sigval)
        finally:
            if watch is not None:
                watch.end_all()
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def meeting_place() -> Iterator[int]:
    """What the ranks meet through, on a free port that nobody beyond this machine reaches."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        _HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    try:
        yield port
    finally:
        del store


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What says to a process that it is a rank, of so many that meet on a port; this one has started it."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {
        **{name: value for name, value in defaults.items() if name not in os.environ},
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank has to make the store
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        LAUNCHER: str(os.getpid()),
    }


@dataclass(frozen=True)
class _End:
    """Of a rank: its exit code, negative for a signal, what it has reported, and when."""

    rank: int
    code: int
    report: str | None
    at: float


class Watch:
    """Ranks that have been started, until they have ended.

    Args:
        timeout: see :func:`launch`.
    """

    def __init__(self, context: PContext, timeout: float) -> None:
        self._context, self._timeout = context, timeout
        self._pids = context.pids()
        self._signals: list[int] = []
        self._ended: dict[int, _End] = {}
        self._stopped = dict.fromkeys(self._pids, 0.0)  # seconds for which a rank was seen so

    def note(self, number: int, frame: Any) -> None:
        """A handler of signals."""
        self._signals.append(number)

    def until_all_have_ended(self) -> Outcome:
        """Returns when all have, or when those that still run are to be ended."""
        handed_on, deadline = 0, math.inf
        while len(self._ended) < len(self._pids) and time.monotonic() < deadline:
            time.sleep(_LOOK)
            self._look()
            for number in self._signals[handed_on:]:
                handed_on += 1
                if 0 not in self._ended:
                    os.kill(self._pids[0], number)
                if handed_on > 1:
                    deadline = min(deadline, time.monotonic() + _AT_ONCE)
            if hung := [rank for rank, seconds in self._stopped.items() if seconds > self._timeout]:
                return Outcome(1, f"{_ranks(hung)} stopped for {self._timeout:g} s")
            if 0 in self._ended or self._failures():
                is_over = self._signals and 0 in self._ended
                deadline = min(deadline, time.monotonic() + (0 if is_over else _SETTLE))
        return self._outcome()

    def end_all(self) -> None:
        """Leave no process of theirs."""
        for rank, pid in self._pids.items():
            if (
                rank in self._ended
            ):  # what it has started; it is kept until then, and so is its number
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        self._context.close(signal.SIGTERM, timeout=_TERMINATE)

    def _look(self) -> None:
        for rank, pid in self._pids.items():
            if rank in self._ended:
                continue
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                self._stopped[rank] = self._stopped[rank] + _LOOK if _is_stopped(pid) else 0.0
                continue
            code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            report, at = reported(self._context.error_files[rank])
            self._ended[rank] = _End(rank, code, report, at or time.time())
            self._stopped[rank] = 0.0

    def _failures(self) -> list[_End]:
        """Those that have failed, first the one that the others follow: a rank that is gone makes them fail,
        and one that was killed has reported nothing."""
        failed = [end for end in self._ended.values() if end.code]
        return sorted(failed, key=lambda end: (end.code > 0, end.report is None, end.at))

    def _outcome(self) -> Outcome:
        first, failed = self._ended.get(0), self._failures()
        if first is not None and (self._signals or not failed):
            return Outcome(first.code)
        if not failed:
            return Outcome(128 + self._signals[-1])
        cause = failed[0]
        code = max(cause.code, 1)
        ends = {(end.code, end.report) for end in self._ended.values()}
        is_one = len(ends) == 1 and len(self._ended) == len(self._pids)  # as one process
        has_said = cause.report == "" or (cause is first and cause.code > 0 and not cause.report)
        return Outcome(code, (cause.report or "") if is_one or has_said else self._told(cause))

    def _told(self, cause: _End) -> str:
        running = [rank for rank in self._pids if rank not in self._ended]
        text = told(cause.rank, cause.code, cause.report)
        if cause.code == -signal.SIGABRT and running:
            hint = "as NCCL does where others do not come to a collective"
            return f"{text}, {hint}: {_ranks(running)} running"
        if running and cause.code > 0 and _LATE.search(cause.report or ""):
            return (
                f"{_ranks(running)} running, but did not come to a collective within {self._timeout:g} s "
                "(--collective-timeout)"
            )
        return text


def told(rank: int, code: int, report: str | None) -> str:
    """How a rank has ended: its exit code, negative for a signal, and what it has reported."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = {"SIGKILL": " (by somebody, or by the system for want of memory)"}.get(name, "")
        return f"rank {rank} was ended by {name}{hint}"
    if report is None:
        return f"rank {rank} ended with exit code {code}"
    return f"rank {rank}: {report}"


def _ranks(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"rank {numbers} is" if len(ranks) == 1 else f"ranks {numbers} are"


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; of Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(") ")[2].startswith("T")
