"""Times the server beside `transformers serve` and beside the engine alone, and writes one JSON file.

    python -m benchmarks.serve [peers | engine | arrivals | wide ...] [--dtype ...] [--threads N] [--quick]

All but `wide` serve the demo model. The file is benchmarks/serve.json, with a page of tables beside it, or
--output; a quick run writes none unless it is told where.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.budget import Budget
from benchmarks.serving import goals, tables
from benchmarks.serving.run import PARTS, Effort, Run
from mllama.demo import checkpoint_path

FORMAT = 1
OUTPUT = machine.ROOT / "benchmarks" / "serve.json"
PACKAGES = ("fastapi", "uvicorn", "openai", "accelerate")  # beside those of `machine.versions`


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "what", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each server and of the engine (default: 1)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="about two minutes: one round, fewer requests"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the file to write (default: {OUTPUT.relative_to(machine.ROOT)}; of a quick run none)",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; expected the name of a file")
    options.what = options.what or list(PARTS)
    if options.output is None and not options.quick:
        options.output = OUTPUT
    return options


def versions() -> dict[str, str | None]:
    """Those that `benchmarks.run` tells, and the servers' own."""
    found = machine.versions()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    budget, cpu = Budget(), torch.device("cpu")
    run = Run(
        checkpoint_path(),
        options.dtype,
        options.threads,
        options.seed,
        Effort.of(options.quick),
        budget,
    )
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    head: dict[str, Any] = {
        "format": FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.serve", *(arguments or sys.argv[1:])]),
        "dtype": options.dtype,
        "server_threads": options.threads,
        "seed": options.seed,
        "machine": machine.describe(cpu),
        "versions": versions(),
        **machine.commit(),
    }
    failed = {}
    with budget.interruptible():
        for part in PARTS:
            if part in options.what and not budget.interrupted:
                try:
                    run.measure(part)
                except RuntimeError as error:  # of a server, or for answers that are wrong
                    failed[part] = str(error)
                    print(f"{part}: not measured: {error}", flush=True)
    document = head | run.document
    document |= {
        "goals": goals.judged(document),
        "failed": failed,
        "interrupted": budget.interrupted,
        "seconds": round(time.perf_counter() - clock),
    }
    print(tables.goal_table(document))
    print(f"{document['seconds']} s")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        page = options.output.with_suffix(".md")
        page.write_text(tables.page(document))
        print(f"written to {options.output} and {page}")
    return 1 if failed or budget.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
