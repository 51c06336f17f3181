"""Times ops and the model beside their peers and writes one JSON file.

    python -m benchmarks.run [OP ... | ops | model | training] [--device ...] [--dtype ...] [--quick]

Without a name all ops, the model and a training step are run. The file is
benchmarks/results/<machine>-<date>.json, or --output; `python -m benchmarks.report` and
`python -m benchmarks.plot` read it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, ceilings, machine, model, quantized_model, training_step
from benchmarks.budget import QUICK_SECONDS, Budget
from benchmarks.case import OURS, Case, Setting
from benchmarks.measure import INTERRUPTED, Effort, add_floor, measure
from benchmarks.runs import RESULTS
from benchmarks.tables import DTYPES
from benchmarks.timing import keep_freed_memory
from mllama_kernels import _dispatch

FORMAT = 1
# Of the time of a quick run, among the parts that were asked for.
SHARES = {"ops": 0.35, "model": 0.4, "training": 0.25}
PLAIN_SHARE = 0.6  # of the model's time, of its rows without quantised weights


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.splitlines()[0]
    )
    names = [*cases.OPS, "ops", "model", "training"]
    parser.add_argument(
        "what", nargs="*", metavar="OP|ops|model|training", help=f"any of {', '.join(names)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: bfloat16; CPU: and float32"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"about {QUICK_SECONDS / 60:.0f} minutes at most: fewer shapes and rounds, smaller ones where "
        "the machine is slow, and peers left out where no time is left",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: those of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the file to write the results to")
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - set(names):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; expected the name of a file")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for op, reason in _dispatch.plain_ops(options.device).items():
        parser.error(f"{op} cannot run on {options.device} as a kernel: {reason}")
    options.dtype = options.dtype or ["bfloat16", *["float32"] * (options.device == "cpu")]
    return options


def line(row: dict[str, Any]) -> str:
    """One row on the terminal."""
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    head = f"{row['op']:24}{sizes:60} {row['dtype']:9}"
    mine = next(impl for impl in row["impls"] if impl["name"] == OURS)
    if mine["status"] != "timed":
        return f"{head} {mine['status']}: {mine['reason']}"
    peers = [impl for impl in row["impls"] if impl is not mine and impl["status"] == "timed"]
    text = f"{head}{mine['us']['median']:10.1f} us"
    for peer in sorted(peers, key=lambda impl: impl["us"]["median"])[:2]:
        text += f"  {peer['ours_is_faster']['median']:.2f}x {peer['name']}"
    return text


class ResultFile:
    """The document, written again after every row: a run that is cut short leaves what it has."""

    def __init__(self, path: Path, head: dict[str, Any], budget: Budget) -> None:
        self.path, self.budget = path, budget
        self.document: dict[str, Any] = {
            **head,
            "skipped": {},
            "left_out": [],
            "rows": [],
            "model": [],
            "training": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.document[part].append(row)
        self.hold_against(self.document["ceilings"])
        self.write()

    def leave_out(self, case: Case | str, reason: str) -> None:
        self.document["left_out"].append({"case": str(case), "reason": reason})
        self.budget.say(f"left out: {case}: {reason}")

    def rates(self, dtypes: list[torch.dtype]) -> dict[torch.dtype, float]:
        """TFLOP/s of the library's products, by which the time of a model is foretold."""
        names = {dtype: str(dtype).removeprefix("torch.") for dtype in dtypes}
        return {d: self.document["ceilings"][f"matmul_tflops_{name}"] for d, name in names.items()}

    def hold_against(self, ceiling: dict[str, float]) -> None:
        """The ceilings of this run, and every row's share of its floor under them."""
        self.document["ceilings"] = ceiling
        for row in [*self.document["rows"], *self.document["training"]]:
            add_floor(row, ceiling)
        for row in self.document["model"]:
            model.add_floor(row)

    def write(self, **values: Any) -> None:
        self.document |= values
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")


def foretold(case: Case, ceiling: dict[str, float]) -> float:
    """Seconds of a case: every implementation a few times, and its exact result, by the rate of products."""
    flops = case.flops * (4 * len(case.impls) + 4)
    return flops / (ceiling[f"matmul_tflops_{case.dtype_name}"] * ceilings.TERA)


def chosen_cases(
    names: list[str], device: torch.device, options: argparse.Namespace, results: ResultFile
) -> list[Case]:
    """What is measured; of each op in a quick run what there is time for, or its smallest case."""
    by_op = []
    for op in names:
        if reason := cases.missing(op):
            results.document["skipped"][op] = reason
            print(f"{op}: skipped, {reason}", flush=True)
            continue
        for name in options.dtype:
            setting = Setting(device, getattr(torch, name), options.quick)
            by_op.append(list(cases.cases(op, setting)))
    if not results.budget.limited:
        return [case for group in by_op for case in group]
    share = results.budget.left / max(1, sum(map(len, by_op)))
    chosen = []
    for group in by_op:
        seconds = {id(case): foretold(case, results.document["ceilings"]) for case in group}
        fits = [c for c in group if seconds[id(c)] <= 3 * share]
        fits = fits or [min(group, key=lambda c: seconds[id(c)])]
        for case in group:
            if case not in fits:
                results.leave_out(case, f"would take about {seconds[id(case)]:.0f} s")
        chosen += fits
    return chosen


def run_ops(
    names: list[str], device: torch.device, options: argparse.Namespace, results: ResultFile
) -> None:
    budget = results.budget
    effort = Effort.of(device, options.quick, budget)
    chosen = chosen_cases(names, device, options, results)
    for number, case in enumerate(chosen):
        if budget.over:
            results.leave_out(case, INTERRUPTED if budget.interrupted else "no time was left")
            continue
        budget.say(f"{number + 1} of {len(chosen)} cases: {case}")
        torch.manual_seed(options.seed)
        with budget.share(1 / (len(chosen) - number)):
            row = measure(case, effort)
        results.add("rows", row)
        print(line(row), flush=True)


def run_model(device: torch.device, options: argparse.Namespace, results: ResultFile) -> None:
    dtypes = [getattr(torch, name) for name in options.dtype]
    rates = results.rates(dtypes)
    budget = results.budget

    def quantised() -> Iterator[dict[str, Any]]:
        ceiling = results.document["ceilings"]
        return quantized_model.run(
            device, dtypes, options.quick, options.seed, budget, ceiling, results.leave_out
        )

    def plain() -> Iterator[dict[str, Any]]:
        with budget.share(PLAIN_SHARE):
            yield from model.run(device, dtypes, options.quick, options.seed, budget, rates)

    for row in chain(plain(), quantised()):
        results.add("model", row)
        print(model.line(row), flush=True)


def run_training(device: torch.device, options: argparse.Namespace, results: ResultFile) -> None:
    dtypes = [getattr(torch, name) for name in options.dtype if name != "float16"]
    rates = results.rates(dtypes)
    for row in training_step.run(
        device, dtypes, options.quick, options.seed, results.budget, rates
    ):
        results.add("training", row)
        print(line(row), flush=True)


def slug(described: dict[str, Any]) -> str:
    name = described.get("gpu") or f"{described['cpu']} {described['cpu_capability']}"
    words = re.sub(r"\(.*?\)|nvidia|processor", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "cpu"


def default_path(described: dict[str, Any], started: datetime) -> Path:
    return RESULTS / f"{slug(described)}-{started:%Y-%m-%d-%H%M}.json"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    budget = Budget(QUICK_SECONDS if options.quick else math.inf)
    with budget.interruptible():
        return measure_all(options, budget, " ".join(arguments or sys.argv[1:]))


def measure_all(options: argparse.Namespace, budget: Budget, command: str) -> int:
    """Everything that was asked for, and the exit status."""
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    described = machine.describe(device)
    print(f"{described.get('gpu') or described['cpu']}, {described['threads']} threads")
    if device.type == "cpu":
        described["keeps_freed_memory"] = keep_freed_memory()
    head = {
        "format": FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.run {command}",
        "parts": [],
        "seed": options.seed,
        "machine": described,
        "versions": machine.versions(),
        **machine.commit(),
    }
    names = dict.fromkeys([*options.dtype, "float32"])  # by float32 16-bit products are judged too
    dtypes = [getattr(torch, name) for name in names]
    budget.say("what this machine can do at most: copying, reading, products")
    ceiling = ceilings.measure(device, dtypes, 3 if options.quick else 7)
    path = options.output or default_path(described, started)
    results = ResultFile(path, {**head, "ceilings": ceiling}, budget)
    print(" ".join(f"{name} {value}" for name, value in ceiling.items()), flush=True)
    ops = [op for op in cases.OPS if not options.what or {op, "ops"} & set(options.what)]
    work = {"ops": partial(run_ops, ops)} if ops else {}
    work |= {
        name: run_part
        for name, run_part in {"model": run_model, "training": run_training}.items()
        if not options.what or name in options.what
    }
    parts: list[str] = []
    for name, run_part in work.items():
        waiting = list(work)[list(work).index(name) :]
        budget.say(f"{name}; to come: {', '.join(waiting[1:]) or 'nothing'}")
        with budget.share(SHARES[name] / sum(SHARES[one] for one in waiting)):
            run_part(device, options, results)
        if name != "ops" or len(ops) == len(cases.OPS):
            parts.append(name)
        results.write(parts=[] if options.quick or budget.interrupted else parts)
    if not budget.over:
        results.hold_against(
            ceilings.higher(ceiling, ceilings.measure(device, dtypes, 3 if options.quick else 7))
        )
    seconds = round(time.perf_counter() - clock)
    results.write(seconds=seconds, interrupted=budget.interrupted)
    print(f"{seconds} s; written to {results.path}")
    rows = [row for part in ("rows", "model", "training") for row in results.document[part]]
    failed = [row for row in rows if row["impls"][0]["status"] != "timed"]
    for row in failed:
        print(f"not measured: {row.get('op', 'model')} {row['shape']}: {row['impls'][0]['reason']}")
    return 1 if failed or budget.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
