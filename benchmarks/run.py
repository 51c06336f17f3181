"""Times ops and the model beside their peers and writes one JSON file.

    python -m benchmarks.run [OP ... | ops | model | training] [--device ...] [--dtype ...] [--quick]

Without a name all ops, the model and a training step are run. The file is
benchmarks/results/<machine>-<date>.json, or --output; `python -m benchmarks.report` and
`python -m benchmarks.plot` read it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, ceilings, machine, model, training_step
from benchmarks.case import OURS, Setting
from benchmarks.measure import Plan, add_floor, measure
from benchmarks.timing import keep_freed_memory
from mllama_kernels import _library

RESULTS = machine.ROOT / "benchmarks" / "results"
FORMAT = 1
DTYPES = ("bfloat16", "float32", "float16")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.splitlines()[0]
    )
    names = [*cases.MODULES, "ops", "model", "training"]
    parser.add_argument(
        "what", nargs="*", metavar="OP|ops|model|training", help=f"any of {', '.join(names)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: bfloat16; CPU: and float32"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--threads", type=int, help="CPU threads; default: those of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - set(names):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if reason := _library.unavailable(options.device):
        parser.error(f"the kernels cannot run on {options.device}: {reason}")
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

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            **head,
            "skipped": {},
            "rows": [],
            "model": [],
            "training": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.document[part].append(row)
        self.hold_against(self.document["ceilings"])
        self.write()

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


def run_ops(
    names: list[str], device: torch.device, options: argparse.Namespace, results: ResultFile
) -> None:
    plan = Plan.of(device, options.quick)
    for op in names:
        if reason := cases.missing(op):
            results.document["skipped"][op] = reason
            print(f"{op}: skipped, {reason}", flush=True)
            continue
        for name in options.dtype:
            setting = Setting(device, getattr(torch, name), options.quick)
            for case in cases.cases(op, setting):
                torch.manual_seed(options.seed)
                row = measure(case, plan)
                results.add("rows", row)
                print(line(row), flush=True)


def run_model(device: torch.device, options: argparse.Namespace, results: ResultFile) -> None:
    dtypes = [getattr(torch, name) for name in options.dtype]
    for row in model.run(device, dtypes, options.quick, options.seed):
        results.add("model", row)
        print(model.line(row), flush=True)


def run_training(device: torch.device, options: argparse.Namespace, results: ResultFile) -> None:
    dtypes = [getattr(torch, name) for name in options.dtype if name != "float16"]
    for row in training_step.run(device, dtypes, options.quick, options.seed):
        results.add("training", row)
        print(line(row), flush=True)


def slug(described: dict[str, Any]) -> str:
    name = described.get("gpu") or described["cpu"]
    words = re.sub(r"\(.*?\)|nvidia|processor", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "cpu"


def default_path(described: dict[str, Any], started: datetime) -> Path:
    return RESULTS / f"{slug(described)}-{started:%Y-%m-%d-%H%M}.json"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
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
        "command": " ".join(["python -m benchmarks.run", *(arguments or sys.argv[1:])]),
        "parts": [],
        "seed": options.seed,
        "machine": described,
        "versions": machine.versions(),
        **machine.commit(),
    }
    dtypes = [getattr(torch, name) for name in options.dtype]
    ceiling = ceilings.measure(device, dtypes)
    path = options.output or default_path(described, started)
    results = ResultFile(path, {**head, "ceilings": ceiling})
    print(" ".join(f"{name} {value}" for name, value in ceiling.items()), flush=True)
    ops = [op for op in cases.MODULES if not options.what or {op, "ops"} & set(options.what)]
    parts: list[str] = []
    run_ops(ops, device, options, results)
    if len(ops) == len(cases.MODULES):
        parts.append("ops")
    results.write(parts=[] if options.quick else parts)
    for name, run_part in {"model": run_model, "training": run_training}.items():
        if not options.what or name in options.what:
            run_part(device, options, results)
            parts.append(name)
            results.write(parts=[] if options.quick else parts)
    results.hold_against(ceilings.higher(ceiling, ceilings.measure(device, dtypes)))
    seconds = round(time.perf_counter() - clock)
    results.write(seconds=seconds)
    print(f"{seconds} s; written to {results.path}")
    rows = [row for part in ("rows", "model", "training") for row in results.document[part]]
    failed = [row for row in rows if row["impls"][0]["status"] != "timed"]
    for row in failed:
        print(f"not measured: {row.get('op', 'model')} {row['shape']}: {row['impls'][0]['reason']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
