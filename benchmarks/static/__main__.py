"""Figures of the CUDA kernels that need no GPU: what they execute and move, and what they occupy.

    python -m benchmarks.static SITE SIMULATOR [--ops NAME ...] [--check]

SITE is the folder of a simulated build (tests/run_simulated.sh), SIMULATOR that of the built
simulator. Every case of cases.py runs as compute capability 8.0 and 9.0; the counters are joined
with what ptxas says of the same PTX. Writes table.json and table.md; --check compares with them
instead. Fails if a kernel spills, has bank conflicts that its case does not explain, or moves more
than 1.1 times what its case accounts for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.static import compiler, table
from benchmarks.static.case import VARIANTS


def count(site: Path, simulator: Path, ops: list[str]) -> tuple[dict[str, Any], list[table.Row]]:
    """The build's description, and a row per case and architecture; one process per architecture and
    variant."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for arch, variant in itertools.product(compiler.MULTIPROCESSORS, ("", *VARIANTS)):
            sm = compiler.MULTIPROCESSORS[arch]
            output = Path(folder) / f"{arch}-{len(running)}.json"
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "LD_LIBRARY_PATH": str(simulator / "build"),
                "CUDASIM_ARCH": str(arch),
                "CUDASIM_SMS": str(sm.count),
                "CUDASIM_STATS": str(output.with_suffix(".stats")),
                "CUDASIM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            }
            if variant:
                environment |= dict([variant.split("=")])
            command = [sys.executable, "-m", "benchmarks.static.counters"]
            command += [str(output), variant, *ops]
            # Started in the site: `python -m` looks there first, so its library is the one imported.
            running.append((subprocess.Popen(command, env=environment, cwd=site), output))
        if any([process.wait() for process, _ in running]):
            raise SystemExit("a case did not run")
        parts = [json.loads(output.read_text()) for _, output in running]
    return parts[0]["build"], [row for part in parts for row in part["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__.splitlines()[0]
    )
    parser.add_argument("site", type=Path, help="folder of a simulated build")
    parser.add_argument("simulator", type=Path, help="folder of the built simulator")
    parser.add_argument("--ops", nargs="*", default=[], help="only these ops; nothing is written")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    args = parser.parse_args()
    site, simulator = args.site.resolve(), args.simulator.resolve()
    library = next((site / "mllama_kernels").glob("_C*.so"))
    # The cases of one architecture end long before those of the other.
    with ThreadPoolExecutor(1) as beside:
        resources = beside.submit(compiler.resources, library)
        build, rows = count(site, simulator, args.ops)
    found = resources.result()
    table.add_resources(rows, found)
    document = {"nvcc": build["cuda"], "rows": rows}
    messages = table.failures(rows, found)
    if args.check:
        committed = json.loads(table.RESULTS.read_text())
        if committed["nvcc"] != document["nvcc"]:
            print(f"the committed table is of nvcc {committed['nvcc']}: rules checked, counts not")
        else:
            messages += table.differences(committed["rows"], rows)
            missing = {(r["op"], r["shape"]) for r in committed["rows"]} - {
                (r["op"], r["shape"]) for r in rows
            }
            messages += [] if args.ops else [f"{case}: no longer a case" for case in missing]
    elif args.ops:
        print(table.as_markdown(document))
    else:
        table.RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        table.TABLE.write_text(table.as_markdown(document))
    if messages:
        raise SystemExit("\n".join(messages))


if __name__ == "__main__":
    main()
