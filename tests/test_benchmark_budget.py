"""A benchmark run keeps to its time on any machine, and writes what it has when it is told to stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

from benchmarks import ceilings, measure, run, scenario, timing  # noqa: E402
from benchmarks.budget import Budget  # noqa: E402
from benchmarks.case import OURS, PLAIN, Case, Impl  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, and moves when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def case_of(**changes: object) -> Case:
    impls = tuple(Impl(name, lambda x: x.sum(-1)) for name in (OURS, PLAIN, "peer"))
    values = {
        "op": "sum",
        "shape": {"rows": 8},
        "dtype": torch.float32,
        "make": lambda: (torch.randn(8, 64),),
        "truth": lambda x: x.sum(-1),
        "impls": (*impls, Impl("torch.compile", lambda x: x.sum(-1))),
        "bytes": 2048,
    }
    return Case(**(values | changes))


def test_a_part_leaves_to_the_next_what_it_does_not_take(clock):
    budget = Budget(100)
    with budget.share(0.25):
        assert budget.left == 25 and not budget.over
        with budget.share(0.5):
            clock[0] += 5
            assert budget.left == 7.5
        clock[0] += 15
        assert budget.left == 5
    assert budget.left == 80
    with budget.share(0.25):
        clock[0] += 50
        assert budget.over
    assert budget.left == 30
    assert Budget().left == math.inf and not Budget().limited
    budget.interrupted = True
    assert budget.over


def test_rounds_are_whole_and_at_least_one(clock):
    budget, calls = Budget(10), []

    def turn(name: str) -> float:
        calls.append(name)
        clock[0] += 4
        return 1.0

    rounds = [lambda: turn("a"), lambda: turn("b")]
    assert timing.interleave(rounds, 9, budget) == [[1.0], [1.0]] and calls == ["a", "b", "b"]
    assert timing.interleave(rounds, 2, budget) == [[1.0], [1.0]]  # though the time is over
    assert timing.interleave(rounds, 3) == [[1.0] * 3] * 2
    budget.interrupted = True
    assert timing.interleave(rounds, 2, budget) == [[], []]


def statuses(effort: measure.Effort) -> dict[str, str]:
    row = measure.measure(case_of(), effort)
    json.dumps(row)
    return {impl["name"]: impl["status"] for impl in row["impls"]}


def test_without_time_ours_and_plain_pytorch_are_measured():
    effort = measure.Effort(CPU, rounds=3, seconds=1e-4, cold_bytes=10_000)
    assert set(statuses(effort).values()) == {"timed"}
    assert statuses(replace(effort, compiles=False))["torch.compile"] == "left out"
    late = statuses(replace(effort, budget=Budget(0)))
    assert late == {OURS: "timed", PLAIN: "timed", "peer": "left out", "torch.compile": "left out"}
    stopped = Budget()
    stopped.interrupted = True
    assert set(statuses(replace(effort, budget=stopped)).values()) == {"left out"}


def test_an_interrupted_case_keeps_its_whole_rounds():
    budget, calls = Budget(), []

    def ours(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        budget.interrupted = budget.interrupted or len(calls) > 1000
        return x.sum(-1)

    case = case_of(impls=(Impl(OURS, ours), Impl(PLAIN, lambda x: x.sum(-1))))
    effort = measure.Effort(CPU, rounds=10**6, seconds=1e-4, cold_bytes=10_000, budget=budget)
    mine, plain = measure.measure(case, effort)["impls"]
    assert mine["status"] == plain["status"] == "timed"
    assert 1 <= len(mine["rounds_us"]) == len(plain["rounds_us"]) < 10**6


@pytest.mark.parametrize("tflops, tile", [(1.0, 560), (1e-4, 112), (1e-9, 112)])
def test_images_are_as_large_as_there_is_time_for(tflops, tile):
    def flops(model: object, wanted: scenario.Scenario) -> int:
        return 2 * sum(scenario.products(model, wanted))

    wanted = scenario.Scenario(1, 32, 8)
    chosen = scenario.fitting(scenario.REDUCED, wanted, flops, 60.0, tflops)
    assert chosen == replace(wanted, tile=tile)
    assert chosen.image_tokens == 4 * ((tile // 14) ** 2 + 1)
    assert ("tile pixels" in chosen.sizes(scenario.REDUCED)) == (tile != 560)


def test_of_an_op_what_there_is_time_for_or_the_smallest(monkeypatch, tmp_path):
    found = [case_of(shape={"rows": n}, flops=n * 10**9) for n in (1, 10, 100, 10**6)]
    monkeypatch.setattr(run.cases, "cases", lambda op, setting: found)
    options = run.parse(["swiglu", "--quick", "--dtype", "float32", "--device", "cpu"])

    def chosen(seconds: float, tflops: float) -> list[int]:
        head = {"ceilings": {"matmul_tflops_float32": tflops}}
        results = run.ResultFile(tmp_path / "r.json", head, Budget(seconds))
        kept = run.chosen_cases(["swiglu"], CPU, options, results)
        left_out = results.document["left_out"]
        assert len(kept) + len(left_out) == 4 and all("would take" in x["reason"] for x in left_out)
        return [case.shape["rows"] for case in kept]

    assert chosen(math.inf, 1e-9) == [1, 10, 100, 10**6]
    assert chosen(300, 1.0) == [1, 10, 100]
    assert chosen(300, 1e-9) == [1]


def test_ceilings_are_no_zeros_and_16_bits_may_use_float32():
    assert ceilings.matmul(CPU, torch.float32, 1) > 0
    slow = {"matmul_tflops_bfloat16": 1e-3, "matmul_tflops_float32": 0.1, "copy_gbps": 10.0}
    assert ceilings.floor(0, 10**11, "copy", "bfloat16", slow) == (1.0, "matmul")
    assert ceilings.computes("bfloat16", {"matmul_tflops_bfloat16": 2.0}) == 2.0
    assert ceilings.computes("float32", slow) == 0.1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_writes_what_it_has(tmp_path, number):
    path = tmp_path / "run.json"
    words = ["-m", "benchmarks.run", "rms_norm", "swiglu", "--device", "cpu", "--output", str(path)]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if " of " in line and "cases" in line:
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "interrupted" in errors, errors
    document = json.loads(path.read_text())
    assert document["interrupted"] and document["parts"] == []
    assert document["rows"] or document["left_out"]


def test_a_folder_as_output_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["rms_norm", "--device", "cpu", "--output", str(tmp_path)])
    assert "is a folder; expected the name of a file" in capsys.readouterr().err
