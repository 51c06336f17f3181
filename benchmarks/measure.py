"""One case to one row: gate, rotation, interleaved rounds, figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import ceilings, machine
from benchmarks.budget import Budget
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl
from benchmarks.correctness import Gate, to_json
from benchmarks.peers import backend_used, wrong_backend
from benchmarks.timing import (
    CpuTimer,
    CudaTimer,
    Spread,
    copies_for,
    interleave,
    make_timer,
    ratios,
    significant,
)
from mllama_kernels import QuantizedTensor

INTERRUPTED = "the run was interrupted before"


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: bursts per implementation; three where a burst takes more than ``patience`` seconds.
        seconds: length of a burst.
        budget: of the case; when it is over, ours and plain PyTorch are still measured, in one round.
        compiles: whether there is time for torch.compile.
        reader: by which the read bandwidth is measured after each case, if at all.
    """

    device: torch.device
    rounds: int
    seconds: float
    cold_bytes: int
    patience: float = 0.5
    budget: Budget = field(default_factory=Budget)
    compiles: bool = True
    reader: ceilings.Reader | None = None

    @classmethod
    def of(cls, device: torch.device, quick: bool, budget: Budget) -> Effort:
        gpu = device.type == "cuda"
        rounds = (5 if quick else 11) if gpu else (3 if quick else 5)
        seconds = 0.005 if gpu else 0.03
        return cls(
            device,
            rounds,
            seconds,
            machine.cold_bytes(device),
            budget=budget,
            compiles=gpu or not quick,
            reader=None if gpu else ceilings.Reader(device),
        )


def nbytes(args: Arguments) -> int:
    """Bytes of the tensors, a view counted as what it shows."""
    return sum(t.nbytes for t in args if torch.is_tensor(t) or isinstance(t, QuantizedTensor))


def in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


class _Contestant:
    """An implementation in one case: its record, and its timer if it may be timed."""

    def __init__(self, impl: Impl, is_ours: bool) -> None:
        self.impl, self.is_ours = impl, is_ours
        self.record: dict[str, Any] = {"name": impl.name, "status": "timed"}
        self.timer: CpuTimer | CudaTimer | None = None

    def refuse(self, status: str, reason: str) -> None:
        self.record |= {"status": status, "reason": reason}

    def admit(self, gate: Gate, copies: list[Arguments], effort: Effort) -> None:
        """Check it on the first copy and, if it is right and what it says it is, make its timer."""
        if self.impl.unavailable:
            return self.refuse("unavailable", self.impl.unavailable)
        if effort.budget.interrupted:
            return self.refuse("left out", INTERRUPTED)
        if effort.budget.over and self.impl.name not in (OURS, PLAIN):
            return self.refuse("left out", "no time was left")
        if self.impl.name == "torch.compile" and not effort.compiles:
            return self.refuse("left out", "compiling takes longer than a quick run")
        try:
            prepared = [self.impl.prepare(*args) for args in copies]
            output = self.impl.call(*prepared[0])
            error, refusal = gate.check(self.impl, output, self.is_ours)
            del output
            self.record["error"] = to_json(error)
            if refusal:
                return self.refuse("wrong", refusal)
            used = backend_used(self.impl.name, lambda: self.impl.call(*prepared[0]), effort.device)
            self.record |= {"ran": used} if used else {}
            if refusal := wrong_backend(self.impl.name, used):
                return self.refuse("unavailable", refusal)
            self.timer = make_timer(effort.device, self.impl.call, prepared, effort.seconds)
        except Exception as error:  # a peer may fail in any way; the row says how
            self.refuse("failed", in_words(error))


def measure(case: Case, effort: Effort) -> dict[str, Any]:
    """The row of a case, ready for JSON. Only implementations that passed the gate have times."""
    with torch.inference_mode(not case.backward):
        return _measure(case, effort)


def _measure(case: Case, effort: Effort) -> dict[str, Any]:
    torch.compiler.reset()
    first = case.make()
    gate = Gate(case, first)
    # Not all arguments are read by each implementation, and some not at all.
    copies = copies_for(min(nbytes(first), case.bytes), effort.cold_bytes)
    arguments = [first, *(case.make() for _ in range(copies.count - 1))]
    before = machine.state(effort.device)
    contestants = [_Contestant(impl, impl.name == OURS) for impl in case.impls]
    for contestant in contestants:
        contestant.admit(gate, arguments, effort)
    timed = [c for c in contestants if c.timer is not None]
    slowest = max((c.timer.once for c in timed), default=0.0)
    rounds = effort.rounds if slowest < effort.patience else min(3, effort.rounds)
    times = interleave([c.timer.round for c in timed], rounds, effort.budget)
    after = machine.state(effort.device)
    read_gbps = effort.reader.round() if effort.reader and timed else None
    mine = next((t for c, t in zip(timed, times) if c.is_ours), None)
    for contestant, one in zip(timed, times):
        if one:
            figures(contestant, one, mine, case)
            if read_gbps is not None:  # on a shared machine it changes within seconds
                read = contestant.record["gbps"] / read_gbps
                contestant.record["share_of_reading"] = significant(read, 3)
        else:
            contestant.refuse("left out", INTERRUPTED)
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "cache": "cold" if copies.cold else "warm",
        "copies": copies.count,
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": case.bound,
        "plain_error": to_json(gate.plain),
        "state": {"before": before, "after": after, "read_gbps": read_gbps},
        "impls": [c.record for c in contestants],
    }


def figures(
    contestant: _Contestant,
    times: list[float],
    mine: list[float] | None,
    case: Case,
) -> None:
    """Fill in what follows from the rounds, and close the timer."""
    timer, record = contestant.timer, contestant.record
    assert timer is not None
    wall = timer.wall()
    timer.close()
    typical = Spread.of(times)
    record |= {
        "timer": timer.name,
        "calls": timer.calls,
        "us": Spread.of([t * 1e6 for t in times]).to_json(),
        "rounds_us": [significant(t * 1e6, 5) for t in times],
        "gbps": significant(case.bytes / typical.median / ceilings.GB),
    }
    if case.flops:
        record["tflops"] = significant(case.flops / typical.median / ceilings.TERA)
    if wall is not None:
        record["wall_us"] = significant(wall * 1e6)
    if isinstance(timer, CpuTimer):
        record["cpu_us"] = significant(timer.cpu_seconds() * 1e6)
    if why := getattr(timer, "why_no_graph", None):
        record["why_no_graph"] = why
    if mine is not None and not contestant.is_ours:
        record["ours_is_faster"] = ratios(mine, times).to_json()


def add_floor(row: dict[str, Any], ceiling: dict[str, float]) -> None:
    """The time below which this machine cannot do the case, and the share of it that each reaches."""
    seconds, what = ceilings.floor(row["bytes"], row["flops"], row["bound"], row["dtype"], ceiling)
    row |= {"floor_us": significant(seconds * 1e6), "floor_is": what}
    for impl in row["impls"]:
        if impl["status"] == "timed":
            impl["share_of_floor"] = significant(seconds * 1e6 / impl["us"]["median"], 3)
