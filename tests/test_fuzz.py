"""The fuzz test itself: it reaches every op, repeats a call by its number, and sees what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuzz_ops
import pytest
import torch
from confinement import confined

import mllama_kernels
from mllama_kernels import _library

TESTS = Path(__file__).parent
SECONDS = 10
RUN = """
import sys

sys.path.insert(0, sys.argv.pop(1))
import fuzz_ops

assert fuzz_ops.main() == 0
"""


def test_every_op_is_called():
    names = torch._C._dispatch_get_all_op_names()
    ops = {name.partition("::")[2] for name in names if name.startswith("mllama_kernels::")}
    called = {
        kind.op + ("_backward" if kind.surface == "backward" else "")
        for kind in fuzz_ops.KINDS
        if kind.surface in ("compiled", "backward")
    }
    assert called == {name.partition(".")[0] for name in ops}
    assert {kind.op for kind in fuzz_ops.KINDS if kind.surface == "public"} == set(_library.OPS)


def test_a_number_is_a_call():
    for number in range(len(fuzz_ops.KINDS)):
        first, second = (fuzz_ops.Case(7, number) for _ in range(2))
        assert str(first) == str(second)
        assert str(first) != str(fuzz_ops.Case(8, number))


def _wrong_value(gate_up, right):
    out = right(gate_up)
    out.view(-1)[-1:] += 1
    return out


def _written(gate_up, right):
    out = right(gate_up)
    gate_up.untyped_storage().fill_(0)
    return out


def _other_error(gate_up, right):
    raise ZeroDivisionError


def _refusal(gate_up, right):
    raise RuntimeError("mllama_kernels.swiglu: no")


def _unset(gate_up, right):
    out = right(gate_up)
    return out.fill_(float("nan"))


@pytest.mark.parametrize("fault", [_wrong_value, _written, _other_error, _refusal, _unset])
def test_faults_are_found(fault, monkeypatch):
    """Among the calls of one function, of which the right one gives no finding."""
    right = mllama_kernels.swiglu
    kinds = enumerate(fuzz_ops.KINDS)
    (place,) = (i for i, kind in kinds if kind == ("swiglu", "public"))
    numbers = range(place, place + 40 * len(fuzz_ops.KINDS), len(fuzz_ops.KINDS))
    assert [fuzz_ops.try_case(1, n, 20)[1] for n in numbers] == [""] * len(numbers)
    monkeypatch.setattr(mllama_kernels, "swiglu", lambda gate_up: fault(gate_up, right))
    assert sum(fuzz_ops.try_case(1, n, 20)[0] == "finding" for n in numbers) >= 5


def test_ops_survive():
    """On the build at hand; tests/run_fuzz.sh builds one with sanitizers for it."""
    ended = confined(RUN, TESTS, f"--seconds={SECONDS}", "--seed=1", seconds=30 * SECONDS)
    assert ended.kind == "ok", ended.out[-3000:] + ended.err[-3000:]
    assert "compared" in ended.out


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_ops_survive_under_sanitizers(request):
    if _library.simulated:
        pytest.skip("sanitizers see the CPU kernels")
    seed = request.config.getoption("--seed")
    done = subprocess.run(
        ["bash", TESTS / "run_fuzz.sh", "--seconds=1200", f"--seed={seed}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
