"""Calls every op with hostile arguments, as its public function and as the compiled op behind it.

    python tests/fuzz_ops.py --seconds 120 --seed 1      ends with status 1 and one block per finding
    python tests/fuzz_ops.py --seed 1 --case 4711        that one call again, in this process

A call may return or raise one of `REFUSALS`. A signal, a sanitizer's report, a call that does not end, an
argument that was written to, a refusal of what the documentation allows and a wrong result are findings. The
same seed and number make the same call on every machine with the same kinds of kernels. Meant to run under
sanitizers (tests/run_fuzz.sh), it takes every build.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from fuzz_calls import Call, Draw, backward, forward, public
from fuzz_checks import Finding, Memory, check_against_compact, check_against_reference
from fuzz_layouts import describe, scatter
from fuzz_mutations import mutate
from torch import Tensor

import mllama_kernels
from mllama_kernels import _library, quantized_tensor

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)
# Words of the refusals of layouts that the documentation does not promise.
LAYOUT_WORDS = ("contiguous", "16-byte boundary", "start on a boundary")
LONGEST_MESSAGE = 4000
# Numbers of one worker. Every second one has its results written past the cache, as large ones are.
ROUND = 1000
REPORT = 6000  # characters
LATEST = 120  # seconds that a worker may take beyond its time
LIMIT_BYTES = 8 << 30  # of addresses, where no sanitizer wants more


class Kind(NamedTuple):
    op: str
    surface: str  # public, gradient, compiled, backward


def _kinds() -> list[Kind]:
    trained = [op for op in _library.OPS if hasattr(torch.ops.mllama_kernels, f"{op}_backward")]
    return [
        *(Kind(op, surface) for op in _library.OPS for surface in ("public", "compiled")),
        *(Kind(op, surface) for op in trained for surface in ("gradient", "backward")),
        *(Kind(op, "compiled") for op in (*quantized_tensor.OPS, "quantize_blocks")),
        Kind("quantized_linear", "gradient"),  # by ops of torch
    ]


KINDS = _kinds()


class Case:
    """One call, drawn from a seed and a number."""

    def __init__(self, seed: int, number: int) -> None:
        torch.set_num_threads(1)  # where elements share a place, the last one is to win
        self.kind = KINDS[number % len(KINDS)]
        self.draw = draw = Draw(f"{seed}/{number}")
        op, surface = self.kind
        call = public(op, draw)
        if surface == "compiled":
            call = forward(op, call, draw)
        elif surface == "backward":
            call = backward(op, call, draw)
        self.mutated, self.scattered = draw.chance(0.5), draw.chance(0.75)
        if self.mutated:
            call = mutate(call, draw)
        if self.scattered:
            call = scatter(call, draw)
        self.call = call
        self.gradients: list[Tensor] = []
        self.threads = draw.one_of((1, 1, 1, 2, 5))
        modes = ("plain", "plain", "no_grad", "inference", "autocast")
        self.mode = draw.one_of(modes) if surface == "public" else "plain"

    def __str__(self) -> str:
        state = "changed" if self.mutated else "valid"
        words = ", ".join(f"{name}={describe(value)}" for name, value in self.call.items())
        return f"{self.kind.op} ({self.kind.surface}, {self.mode}, {state}, {self.threads} threads): {words}"

    def _execute(self, call: Call) -> tuple[Tensor, ...]:
        op, surface = self.kind
        if surface in ("compiled", "backward"):
            name = f"{op}_backward" if surface == "backward" else op
            out = getattr(torch.ops.mllama_kernels, name)(*call.values())
        elif surface == "public":
            with _MODES[self.mode]():
                out = getattr(mllama_kernels, op)(**call)
        else:
            return self._gradients(call)
        return tuple([out] if isinstance(out, Tensor) else out)

    def _gradients(self, call: Call, function: Any = None) -> tuple[Tensor, ...]:
        """Results and the gradients of what has one."""
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in call.items()
            if isinstance(value, Tensor)
            and value.dtype.is_floating_point
            and name not in ("cos", "sin")
        }
        function = function or getattr(mllama_kernels, self.kind.op)
        out = function(**{**call, **leaves})
        outs = [out] if isinstance(out, Tensor) else list(out)
        if not self.gradients:
            self.gradients = [self._gradient(o) for o in outs]
        grads = [g.to(o.dtype) for g, o in zip(self.gradients, outs)]
        found = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
        return (*outs, *(g for g in found if g is not None))

    def _gradient(self, out: Tensor) -> Tensor:
        grad = torch.randn(out.shape, generator=self.draw.generator).to(out.dtype)
        return scatter({"grad": grad}, self.draw)["grad"] if self.scattered else grad

    def run(self) -> str:
        """Raises Finding, or says how it went: refused, ran or compared."""
        torch.set_num_threads(self.threads)
        memory = Memory(self.call)
        try:
            outs = self._execute(self.call)
        except REFUSALS as error:
            memory.check_unchanged()
            message = str(error)
            if message.startswith("mllama_kernels.") and len(message) > LONGEST_MESSAGE:
                raise Finding(f"a message of {len(message)} characters: {message[:200]}") from None
            if not self.mutated and not (
                self.scattered and any(word in message for word in LAYOUT_WORDS)
            ):
                raise Finding(f"refuses a valid call: {type(error).__name__}: {message}") from error
            return "refused"
        memory.check_unchanged(but=("k_cache", "v_cache"))
        for out in outs:
            if out.device.type == "cpu":
                out.clone()
        if self.mode == "autocast":
            return "ran"
        if not self.mutated and self.kind.surface in ("public", "gradient"):
            gradients = self._gradients if self.kind.surface == "gradient" else None
            if check_against_reference(self.kind.op, self.call, memory, outs, gradients):
                return "compared"
        return check_against_compact(self.call, memory, outs, self._execute, self.mutated)


_MODES = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


# ---------------------------------------------------------------- one process after another


class Progress:
    """What a worker that may die has done: the number it is at, and counts."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR)

    def write(self, number: int, counts: Counter[str]) -> None:
        os.pwrite(self._file, json.dumps([number, counts]).ljust(4096).encode(), 0)

    def read(self) -> tuple[int, Counter[str]]:
        number, counts = json.loads(os.pread(self._file, 4096, 0) or "[-1, {}]")
        return number, Counter(counts)


def is_sanitized() -> bool:
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def prepare_process(number: int) -> None:
    """No core files; memory is the sanitizer's to limit where there is one."""
    if number // ROUND % 2:
        os.environ["MLLAMA_KERNELS_CPU_CACHE"] = "0"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not is_sanitized():
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(hard, LIMIT_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def try_case(seed: int, number: int, seconds: float, say: bool = False) -> tuple[str, str]:
    """How it went, and a text for a finding."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    case = None
    try:
        case = Case(seed, number)
        if say:
            print(case, flush=True)
        return case.run(), ""
    except Finding as finding:
        return "finding", f"{finding}\n    {case}"
    except Exception:
        return "finding", f"{traceback.format_exc(limit=-4)}\n    {case}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        torch.set_autocast_enabled("cpu", False)  # an error within a region has left it on


def work(options: argparse.Namespace) -> None:
    prepare_process(options.first)
    progress = Progress(options.progress)
    counts: Counter[str] = Counter()
    number = options.first
    while time.time() < options.until and number < options.last:
        if not options.op or KINDS[number % len(KINDS)].op == options.op:
            progress.write(number, counts)
            how, text = try_case(options.seed, number, options.case_seconds)
            counts[how] += 1
            if text:
                print(f"FINDING case {number}: {text}", flush=True)
        number += 1
    progress.write(number, counts)


def again(seed: int, number: int, seconds: float) -> str:
    """What the call that killed a worker does by itself."""
    flags = [f"--seed={seed}", f"--case={number}", f"--case-seconds={seconds}"]
    command = [sys.executable, __file__, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, errors="replace", **pipes)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=LATEST)
    process.kill()
    out, err = process.communicate()
    return out[-REPORT:] + err[:REPORT]


def run_worker(flags: list[str], until: float) -> tuple[int, str]:
    """Its status and what it said, such as a sanitizer's report. One that waits forever,
    which no processor's time counts, is killed."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen([sys.executable, __file__, "--worker", *flags], stderr=said)
        try:
            process.wait(timeout=until - time.time())
        except subprocess.TimeoutExpired:
            process.kill()
        status = process.wait()
        said.seek(0)
        lines = [line for line in said if "failed to allocate" not in line]
        return status, "".join(lines)[:REPORT]


def supervise(options: argparse.Namespace) -> int:
    """Runs workers until the time is over. Returns the number of findings."""
    until = time.time() + options.seconds
    total: Counter[str] = Counter()
    first = options.first
    with tempfile.NamedTemporaryFile() as file:
        progress = Progress(file.name)
        while time.time() < until and first < options.last:
            progress.write(first, Counter())
            last = min(options.last, (first // ROUND + 1) * ROUND)
            words = {"first": first, "last": last, "until": until, "progress": file.name}
            words = {**vars(options), **words}
            del words["worker"], words["case"]
            given = {name.replace("_", "-"): v for name, v in words.items() if v is not None}
            flags = [f"--{name}={value}" for name, value in given.items()]
            status, report = run_worker(flags, until + LATEST)
            number, counts = progress.read()
            total += counts
            first = number
            if status == 0:
                continue
            first += 1
            total["finding"] += 1
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            endless = name == "SIGPROF"
            text = again(options.seed, number, 1 if endless else options.case_seconds)
            name = f"does not end in {options.case_seconds} s" if endless else name
            print(f"FINDING case {number}: {name}\n{report}\nAlone:\n{text}", flush=True)
    ran = sum(total.values())
    parts = ", ".join(f"{count} {how}" for how, count in sorted(total.items()))
    where = "simulated CUDA" if _library.simulated else _library.instruction_set()
    print(
        f"seed {options.seed}, {where}{', sanitized' if is_sanitized() else ''}: {ran} calls up to number "
        f"{first - 1}: {parts}",
        flush=True,
    )
    return total["finding"]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--op", choices=_library.OPS, help="only this op, under the same numbers")
    parser.add_argument("--case", type=int, help="only this number, in this process")
    parser.add_argument("--first", type=int, default=0, help="number to begin with")
    parser.add_argument("--last", type=int, default=2**62, help="number to stop before")
    parser.add_argument(
        "--case-seconds", type=float, default=20, help="of the processor's time, for one call"
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    warnings.simplefilter("ignore")  # of torch, about what is done to tensors here
    if _library.missing:
        sys.exit(f"the compiled ops are not there: {_library.missing}")
    if options.case is not None:
        prepare_process(options.case)
        how, text = try_case(options.seed, options.case, options.case_seconds, say=True)
        print(how, text)
        return how == "finding"
    if options.worker:
        work(options)
        return 0
    return min(supervise(options), 1)


if __name__ == "__main__":
    sys.exit(main())
