"""The other ranks of a process that is the first of them: it starts them, and they end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllama.parallel.launch import environment, meeting_place, told
from mllama.parallel.member import REPORT, Member, reported
from mllama.wording import message

_SETTLE = 4.0  # seconds that they have to end by themselves
_SOON = 1.0  # in which one has ended that others miss


class Others:
    """Processes that are ranks 1 and up of a number of them.

    Args:
        environments: of each.
        compute, arguments: what they call, which is pickled; it is found on the search path of this process.
    """

    def __init__(
        self,
        environments: Mapping[int, Mapping[str, str]],
        compute: Callable[..., None],
        arguments: tuple[Any, ...],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._reports = {rank: each[REPORT] for rank, each in environments.items()}
        self._processes = {
            rank: context.Process(target=_be, args=(each, compute, arguments), daemon=True)
            for rank, each in environments.items()
        }
        # To the kernel their parent is the thread that starts them: it has to live as long as they do.
        self._thread = ThreadPoolExecutor(1, "mllama-ranks")
        self._thread.submit(self._start).result()

    def check(self) -> None:
        """Raises: RuntimeError naming one that has ended, and why."""
        for rank, process in self._processes.items():
            if (code := process.exitcode) is not None:
                raise RuntimeError(told(rank, code, reported(self._reports[rank])[0]))

    def wait(self, seconds: float) -> None:
        """Until all have ended, or for so long."""
        end = time.monotonic() + seconds
        for process in self._processes.values():
            process.join(max(0.0, end - time.monotonic()))

    def end(self) -> None:
        """Leave none."""
        self.wait(_SETTLE)
        for process in self._processes.values():
            process.kill()
            process.join()
        self._thread.shutdown()

    def _start(self) -> None:
        for process in self._processes.values():
            process.start()


@contextmanager
def others_beside(count: int, compute: Callable[..., None], *arguments: Any) -> Iterator[Others]:
    """Make this process the first of so many ranks of this machine, which find each other on its loopback
    interface: until the context ends the environment says so, and the others call ``compute(*arguments)``.
    None of them is left then, nor when this process is killed (on Linux).

    Raises: RuntimeError naming another rank that has ended, in place of one that this has led to here.
    """
    with meeting_place() as port, tempfile.TemporaryDirectory(prefix="mllama-ranks-") as folder:
        environments = {
            rank: {**environment(rank, count, port), REPORT: str(Path(folder, f"{rank}.json"))}
            for rank in range(1, count)
        }
        with _said(environment(0, count, port)):
            others = Others(environments, compute, arguments)
            try:
                yield others
            except RuntimeError:
                others.wait(_SOON)
                others.check()
                raise
            finally:
                others.end()


@contextmanager
def _said(names: Mapping[str, str]) -> Iterator[None]:
    """In the environment, until the context ends."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _be(environment: Mapping[str, str], compute: Callable[..., None], arguments: Any) -> None:
    """A rank, as a process."""
    os.environ.update(environment)
    member = Member.of_environment()
    assert member is not None
    member.end_with_parent()
    member.keep_quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all; the first ends the others
    try:
        compute(*arguments)
    except Exception as error:
        member.fail(1, message(str(error)), "", sys.stderr)
