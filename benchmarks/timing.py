"""Clocks, rotation and rounds.

Every implementation of a case has a timer. A timer calls it on rotating copies of its arguments, so many
that together they exceed the cache several times over; a round is one burst of calls of every
implementation in turn, and what is compared is the ratio within a round.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from benchmarks.budget import Budget

Measured = TypeVar("Measured")

MOST_COPIES = 256
MOST_GRAPH_CALLS = 1024


@dataclass(frozen=True)
class Spread:
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def to_json(self, digits: int = 4) -> dict[str, float]:
        return {name: significant(value, digits) for name, value in vars(self).items()}


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def ratios(ours: Sequence[float], peer: Sequence[float]) -> Spread:
    """How many times faster ours is: the ratio of each round, never the ratio of two medians."""
    return Spread.of([p / o for o, p in zip(ours, peer, strict=True)])


@dataclass(frozen=True)
class Copies:
    """How many copies of the arguments rotate, and whether they leave the cache between two uses."""

    count: int
    cold: bool


def copies_for(nbytes: int, cold_bytes: int) -> Copies:
    """Enough copies to exceed ``cold_bytes``.

    Where that takes more than MOST_COPIES, the arguments are so small that a model has them in its cache
    as well: two copies, and the row is labelled warm. One copy is enough where it is twice that size.
    """
    count = -(-cold_bytes // max(nbytes, 1))
    if count > MOST_COPIES:
        return Copies(2, False)
    return Copies(max(count, 1 if nbytes >= 2 * cold_bytes else 2), True)


class Rotation:
    """Calls a function on one copy of its arguments after the other, continuing where it stopped.

    The last result of every copy stays alive, so that outputs rotate through memory as inputs do.
    """

    def __init__(self, call: Callable[..., Any], copies: Sequence[tuple[Any, ...]]) -> None:
        self._call, self._copies = call, copies
        self._results: list[Any] = [None] * len(copies)
        self._next = 0
        self.uses = [0] * len(copies)

    def __len__(self) -> int:
        return len(self._copies)

    def run(self, calls: int) -> None:
        i, last = self._next, len(self) - 1
        for _ in range(calls):
            self._results[i] = self._call(*self._copies[i])
            self.uses[i] += 1
            i = 0 if i == last else i + 1
        self._next = i

    def drop_results(self) -> None:
        self._results = [None] * len(self)

    def assert_even(self) -> None:
        """No copy was used again before all others were: had it been, it might have been in the cache."""
        assert max(self.uses) - min(self.uses) <= 1, f"copies were used {self.uses} times"


def graph_calls(once: float, seconds: float, copies: int) -> int:
    """Calls in a graph: about ``seconds`` of work, every copy equally often, MOST_GRAPH_CALLS at most.

    A graph with fewer calls than copies, or with no multiple of them, would come back to some of them
    too early at its next replay.
    """
    calls = max(1, round(seconds / max(once, 1e-9) / copies)) * copies
    return max(copies, min(calls, MOST_GRAPH_CALLS // copies * copies))


class CpuTimer:
    """perf_counter around a burst of calls."""

    name = "perf_counter"

    def __init__(
        self, call: Callable[..., Any], copies: Sequence[tuple[Any, ...]], seconds: float
    ) -> None:
        self._rotation = Rotation(call, copies)
        self.calls = 1
        self._cpu: list[float] = []
        self.once = self.round()
        if self.once < seconds:  # the first calls warm up; short ones are timed in bursts
            self.calls = min(len(copies), 8)
            self.once = self.round()
        self.calls = max(1, round(seconds / max(self.once, 1e-9)))
        self._cpu.clear()  # of warming up

    def round(self) -> float:
        """Seconds per call."""
        begin, cpu = time.perf_counter(), time.process_time()
        self._rotation.run(self.calls)
        seconds = (time.perf_counter() - begin) / self.calls
        self._cpu.append((time.process_time() - cpu) / self.calls)
        return seconds

    def cpu_seconds(self) -> float:
        """CPU time per call and thread, of the median round: other work on the machine lengthens it less."""
        return median(self._cpu) / torch.get_num_threads()

    def wall(self) -> float | None:
        """Seconds per call as the caller sees them; None where a round measures just that."""
        return None

    def close(self) -> None:
        self._rotation.assert_even()


class CudaTimer:
    """Events around a captured graph of a burst of calls; around plain calls where capture fails."""

    def __init__(
        self, call: Callable[..., Any], copies: Sequence[tuple[Any, ...]], seconds: float
    ) -> None:
        self._rotation = Rotation(call, copies)
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._rotation.run(len(copies))  # libraries choose algorithms and allocate here
            self.once = self._events(lambda: self._rotation.run(len(copies))) / len(copies)
        self.calls = graph_calls(self.once, seconds, len(copies))
        self._rotation.drop_results()
        torch.cuda.synchronize()
        self.name, self.why_no_graph = "graph", None
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._rotation.run(self.calls)
            self._graph = graph
        except RuntimeError as error:
            self.name, self.why_no_graph = "events", str(error).splitlines()[0]
            self._rotation = Rotation(call, copies)
            torch.cuda.synchronize()
        self.round()  # uploads the graph

    def _events(self, work: Callable[[], None]) -> float:
        """Seconds of ``work`` on the stream."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            work()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def round(self) -> float:
        """Seconds per call on the device."""
        if self._graph is not None:
            return self._events(self._graph.replay) / self.calls
        return self._events(lambda: self._rotation.run(self.calls)) / self.calls

    def wall(self) -> float:
        """Seconds per call of the op called in a loop, launches included."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.cuda.stream(self._stream):
            self._rotation.run(self.calls)
        self._stream.synchronize()
        return (time.perf_counter() - begin) / self.calls

    def close(self) -> None:
        self._rotation.assert_even()
        self._rotation.drop_results()
        self._graph = None
        torch.cuda.synchronize()


def make_timer(
    device: torch.device,
    call: Callable[..., Any],
    copies: Sequence[tuple[Any, ...]],
    seconds: float,
) -> CpuTimer | CudaTimer:
    return (CudaTimer if device.type == "cuda" else CpuTimer)(call, copies, seconds)


def interleave(
    rounds: Sequence[Callable[[], Measured]], count: int, budget: Budget | None = None
) -> list[list[Measured]]:
    """``count`` rounds of A B C, C B A, A B C, ...: what disturbs the machine disturbs neighbours alike.

    Under a budget there are fewer, but whole ones: one at least, and none only if it is interrupted.
    """
    times: list[list[Measured]] = [[] for _ in rounds]
    for number in range(count):
        order = range(len(rounds))
        this: dict[int, Measured] = {}
        for i in order if number % 2 == 0 else reversed(order):
            if budget is not None and (budget.interrupted or (number and budget.over)):
                return times
            this[i] = rounds[i]()
        for i, measured in this.items():
            times[i].append(measured)
    return times


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed, so that a CPU op is not charged for the page faults of its output.

    It favours implementations with many temporaries: the peers.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))
