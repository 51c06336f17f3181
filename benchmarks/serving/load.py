"""Rounds of requests at some numbers of streams, for whoever answers them, and what they took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Protocol

from benchmarks.budget import Budget
from benchmarks.serving.client import Answer, together
from benchmarks.serving.requests import LONGEST, Request, Source
from benchmarks.serving.servers import Server
from benchmarks.timing import Spread, interleave, ratios, significant


class Contender(Protocol):
    """Whoever answers requests.

    Attributes:
        name: in tables.
    """

    name: str

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        """Answer all, so many at a time."""
        ...

    def cpu_seconds(self) -> float:
        """The processor time taken so far."""
        ...


@dataclass(frozen=True)
class Served:
    """A server that is asked over HTTP.

    Attributes:
        server: the process.
        body: makes what is sent of a request.
    """

    name: str
    server: Server
    body: Callable[[Request], dict[str, Any]]

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        bodies = [self.body(request) for request in requests]
        return asyncio.run(together(self.server.port, bodies, streams))

    def cpu_seconds(self) -> float:
        return self.server.cpu_seconds()


@dataclass(frozen=True)
class Workload:
    """A kind of requests.

    Attributes:
        name: in tables.
        make: so many of them, that nobody has asked before.
        counts: how many are asked in a round, by the number of streams.
    """

    name: str
    make: Callable[[Source, int], list[Request]]
    counts: Mapping[int, int]


def workloads(quick: bool) -> list[Workload]:
    """Answers of LONGEST tokens, and natural ones of a few."""
    few = {1: 4, 8: 16, 32: 32} if quick else {1: 16, 8: 32, 32: 64}
    return [
        Workload(
            f"{LONGEST} tokens",
            lambda source, count: source.distinct(count, LONGEST),
            {1: 1, 8: 8, 32: 32} if quick else {1: 4, 8: 8, 32: 32},
        ),
        Workload(
            f"{LONGEST} tokens, ignore_eos",
            lambda source, count: source.distinct(count, LONGEST, with_stops=True),
            {8: 8} if quick else {8: 8, 32: 32},
        ),
        Workload("short answers", Source.distinct, few),
        Workload("the same picture", Source.same, few),
    ]


@dataclass(frozen=True)
class Measured:
    """One round of one contender.

    Attributes:
        wall_s, cpu_s: seconds per request.
        tokens_per_s: of all streams.
        first_token_s, token_s: the median answer's seconds until its first token, and for each after it.
    """

    wall_s: float
    cpu_s: float
    tokens_per_s: float
    first_token_s: float
    token_s: float


def measure_round(
    contender: Contender, requests: Sequence[Request], streams: int
) -> tuple[Measured, list[Answer]]:
    """Ask, and hold the clocks."""
    cpu, begin = contender.cpu_seconds(), time.perf_counter()
    answers = contender.answer(requests, streams)
    seconds = time.perf_counter() - begin
    count = len(answers)
    return Measured(
        wall_s=seconds / count,
        cpu_s=(contender.cpu_seconds() - cpu) / count,
        tokens_per_s=sum(answer.tokens for answer in answers) / seconds,
        first_token_s=median(answer.first_token for answer in answers),
        token_s=median(seconds_per_token(answer) for answer in answers),
    ), answers


def seconds_per_token(answer: Answer) -> float:
    """After the first, some of which may have no text."""
    return (answer.end - answer.begin - answer.first_token) / max(1, answer.tokens - 1)


def row(
    workload: Workload,
    streams: int,
    contenders: Sequence[Contender],
    source: Source,
    rounds: int,
    budget: Budget,
) -> dict[str, Any] | None:
    """Interleaved rounds with the same requests for all; ratios say how many times less the first takes.

    Returns: ready for JSON; None where not one round was whole.
    Raises: RuntimeError for an answer that is not as long as was asked for.
    """
    count = workload.counts[streams]
    asked = [workload.make(source, count) for _ in range(rounds)]
    numbers = {contender.name: iter(asked) for contender in contenders}

    def one(contender: Contender) -> Measured:
        requests = next(numbers[contender.name])
        measured, answers = measure_round(contender, requests, streams)
        for request, answer in zip(requests, answers, strict=True):
            if request.tokens not in (None, answer.tokens):
                raise RuntimeError(
                    f"{contender.name}: an answer has {answer.tokens} tokens, not {request.tokens}"
                )
        return measured

    calls = [lambda contender=contender: one(contender) for contender in contenders]
    found = interleave(calls, rounds, budget)
    if not all(found):
        return None
    return {
        "workload": workload.name,
        "streams": streams,
        "requests": count,
        "contenders": _records(contenders, found),
    }


def _records(
    contenders: Sequence[Contender], found: Sequence[Sequence[Measured]]
) -> list[dict[str, Any]]:
    """Every figure with its spread and its rounds, and against the first contender's."""
    records = []
    for contender, rounds in zip(contenders, found, strict=True):
        record: dict[str, Any] = {"name": contender.name}
        for name in Measured.__dataclass_fields__:
            values = [getattr(one, name) for one in rounds]
            record[name] = Spread.of(values).to_json() | {
                "rounds": [significant(v) for v in values]
            }
            if contender is not contenders[0] and name != "tokens_per_s":
                ours = [getattr(one, name) for one in found[0]]
                record[f"{name}_times_ours"] = ratios(ours, values).to_json()
        records.append(record)
    return records


def percentile_99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1]
