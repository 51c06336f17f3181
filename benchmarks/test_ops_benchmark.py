"""The ops under pytest-benchmark, ours and plain PyTorch: ``pytest benchmarks/test_ops_benchmark.py``.

Not part of the test suite, and no substitute for `python -m benchmarks.run`: one implementation is timed
after the other, so only a quiet machine gives figures that can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import cases, machine
from benchmarks.case import OURS, PLAIN, Case, Impl, Setting
from benchmarks.correctness import Gate, to_json
from benchmarks.measure import nbytes
from benchmarks.timing import Rotation, copies_for

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTING = Setting(DEVICE, torch.bfloat16, quick=True)


def entries() -> Iterator[Any]:
    for op in cases.OPS:
        if reason := cases.missing(op):
            yield pytest.param(None, None, id=op, marks=pytest.mark.skip(reason=reason))
            continue
        for case in cases.cases(op, SETTING):
            for impl in case.impls:
                if impl.name in (OURS, PLAIN):
                    yield pytest.param(case, impl, id=f"{case} {impl.name}".replace(" ", "-"))


@pytest.mark.parametrize(("case", "impl"), list(entries()))
def test_op(case: Case, impl: Impl, benchmark: Any) -> None:
    with torch.inference_mode(not case.backward):
        measure(case, impl, benchmark)


def measure(case: Case, impl: Impl, benchmark: Any) -> None:
    torch.manual_seed(0)
    first = case.make()
    gate = Gate(case, first)
    copies = copies_for(nbytes(first), machine.cold_bytes(DEVICE))
    arguments = [first, *(case.make() for _ in range(copies.count - 1))]
    prepared = [impl.prepare(*args) for args in arguments]
    error, refusal = gate.check(impl, impl.call(*prepared[0]), impl.name == OURS)
    assert refusal is None, refusal
    rotation = Rotation(impl.call, prepared)

    def once() -> None:
        rotation.run(1)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info |= to_json(error) | {"copies": copies.count, "cold": copies.cold}
    benchmark(once)
