"""Times ops and the model beside their peers and writes one JSON file.

    python -m benchmarks.run [OP ... | model] [--device cpu|cuda] [--dtype NAME ...] [--quick]

Without a name everything is run. The file is benchmarks/results/<machine>-<date>.json, or --output;
`python -m benchmarks.report` and `python -m benchmarks.plot` read it.
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

from benchmarks import cases, ceilings, machine, model
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
    names = [*cases.MODULES, "model"]
    parser.add_argument("what", nargs="*", metavar="OP|model", help=f"any of {', '.join(names)}")
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
    head = f"{row['op']:24}{sizes:44}{row['dtype']:9}"
    mine = next(impl for impl in row["impls"] if impl["name"] == OURS)
    if mine["status"] != "timed":
        return f"{head} {mine['status']}: {mine['reason']}"
    peers = [impl for impl in row["impls"] if impl is not mine and impl["status"] == "timed"]
    text = f"{head}{mine['us']['median']:10.1f} us"
    for peer in sorted(peers, key=lambda impl: impl["us"]["median"])[:2]:
        text += f"  {peer['ours_is_faster']['median']:.2f}x {peer['name']}"
    return text


def run_ops(
    names: list[str], device: torch.device, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows, and for each op that could not be measured the reason."""
    plan, rows, skipped = Plan.of(device, options.quick), [], {}
    for op in names:
        if reason := cases.missing(op):
            skipped[op] = reason
            print(f"{op}: skipped, {reason}", flush=True)
            continue
        for name in options.dtype:
            setting = Setting(device, getattr(torch, name), options.quick)
            for case in cases.cases(op, setting):
                torch.manual_seed(options.seed)
                rows.append(measure(case, plan))
                print(line(rows[-1]), flush=True)
    return rows, skipped


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
    names = [op for op in cases.MODULES if op in options.what] or (
        [] if options.what else list(cases.MODULES)
    )
    dtypes = [getattr(torch, name) for name in options.dtype]
    if device.type == "cpu":
        described["keeps_freed_memory"] = keep_freed_memory()
    ceiling = ceilings.measure(device, dtypes)
    print(" ".join(f"{name} {value}" for name, value in ceiling.items()), flush=True)
    rows, skipped = run_ops(names, device, options)
    models = []
    if not options.what or "model" in options.what:
        models = model.run(device, dtypes, options.quick, options.seed)
    ceiling = ceilings.higher(ceiling, ceilings.measure(device, dtypes))
    for row in rows:
        add_floor(row, ceiling)
    for row in models:
        model.add_floor(row, ceiling)
    document = {
        "format": FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock),
        "command": " ".join(["python -m benchmarks.run", *(arguments or sys.argv[1:])]),
        "complete": not options.what and not options.quick,
        "seed": options.seed,
        "machine": described,
        "versions": machine.versions(),
        **machine.commit(),
        "ceilings": ceiling,
        "skipped": skipped,
        "rows": rows,
        "model": models,
    }
    path = options.output or default_path(described, started)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['seconds']} s; written to {path}")
    wrong = [row for row in rows if row["impls"][0]["status"] != "timed"]
    wrong += [row for row in models if row["impls"][0]["status"] != "timed"]
    for row in wrong:
        print(f"not measured: {row.get('op', 'model')} {row['shape']}: {row['impls'][0]['reason']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
