"""Figures of the CUDA kernels that need no GPU: what they execute and move, and what they occupy.

    python -m benchmarks.static SITE SIMULATOR [--ops NAME ...] [--check]

SITE is the folder of a simulated build (tests/run_simulated.sh), SIMULATOR that of the built
simulator. Every case of static_cases.py runs as compute capability 8.0 and 9.0; the counters are
joined with what ptxas says of the same PTX. Writes static.json and static.md; --check
compares with them instead. Fails if a kernel spills, has bank conflicts that its case does not
explain, or moves more than 1.1 times what its case accounts for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import static_compiler
from benchmarks.static_case import VARIANTS

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "static.json", HERE / "static.md"
MOVED_LIMIT = 1.1

Row = dict[str, Any]


def count(site: Path, simulator: Path, ops: list[str]) -> tuple[dict[str, Any], list[Row]]:
    """The build's description, and a row per case and architecture; one process per architecture and
    variant."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for arch, variant in itertools.product(static_compiler.MULTIPROCESSORS, ("", *VARIANTS)):
            sm = static_compiler.MULTIPROCESSORS[arch]
            output = Path(folder) / f"{arch}-{len(running)}.json"
            environment = os.environ | {
                "PYTHONPATH": str(HERE.parent),
                "LD_LIBRARY_PATH": str(simulator / "build"),
                "CUDASIM_ARCH": str(arch),
                "CUDASIM_SMS": str(sm.count),
                "CUDASIM_STATS": str(output.with_suffix(".stats")),
                "CUDASIM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            }
            if variant:
                environment |= dict([variant.split("=")])
            command = [
                sys.executable,
                "-m",
                "benchmarks.static_counters",
                str(output),
                variant,
                *ops,
            ]
            # Started in the site: `python -m` looks there first, so its library is the one imported.
            running.append((subprocess.Popen(command, env=environment, cwd=site), output))
        if any([process.wait() for process, _ in running]):
            raise SystemExit("a case did not run")
        parts = [json.loads(output.read_text()) for _, output in running]
    return parts[0]["build"], [row for part in parts for row in part["rows"]]


def add_resources(rows: list[Row], found: dict[int, dict[str, Any]]) -> None:
    names = sorted({launch["kernel"] for row in rows for launch in row["launches"]})
    short = dict(zip(names, static_compiler.readable(names)))
    for row in rows:
        for launch in row["launches"]:
            resources = found[row["arch"]][launch["kernel"]]
            threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
            blocks = static_compiler.blocks_per_sm(
                row["arch"], threads, resources.registers, launch["shared_bytes"]
            )
            launch["kernel"] = short[launch["kernel"]]
            launch["registers"] = resources.registers
            launch["spill_bytes"] = resources.spill_bytes
            launch["blocks_per_sm"] = blocks
            launch["occupancy"] = blocks * threads / 2048
        moved = sum(launch["moved_bytes"] for launch in row["launches"])
        row["moved_bytes"] = moved
        row["moved_to_floor"] = round(moved / row["floor_bytes"], 4)
        expected = row["floor_bytes"] + sum(row["again"].values())
        row["moved_to_expected"] = round(moved / expected, 4)


def failures(rows: list[Row], found: dict[int, dict[str, Any]]) -> list[str]:
    messages = []
    for arch, kernels in found.items():
        spilling = [name for name, resources in kernels.items() if resources.spill_bytes]
        for name in static_compiler.readable(spilling) if spilling else []:
            messages.append(f"{static_compiler.TARGETS[arch]}: {name} spills registers")
    for row in rows:
        where = f"{row['arch']} {row['op']} {row['shape']}"
        ratio = row["moved_to_expected"]
        if ratio > MOVED_LIMIT:
            messages.append(f"{where}: moves {ratio} times what its case accounts for")
        for launch in row["launches"]:
            extra, all_of_them = launch["shared_conflicts"], launch["shared_wavefronts"]
            if extra > row["conflicts_allowed"] * all_of_them:
                messages.append(
                    f"{where}: {launch['kernel']}: {extra} of {all_of_them} shared wavefronts are conflicts"
                )
    return messages


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}" if count < 1e8 else f"{count / 1e6:.0f}"


def kernel_lines(row: Row) -> list[str]:
    lines = []
    for i, launch in enumerate(row["launches"]):
        first = i == 0
        tensor_flops = launch["mma_flops"] + launch["wgmma_flops"]
        cells = [
            row["op"] if first else "",
            row["shape"] if first else "",
            f"`{launch['kernel']}`",
            " x ".join(str(n) for n in launch["grid"] if n > 1) or "1",
            " x ".join(str(n) for n in launch["block"] if n > 1),
            str(launch["registers"]),
            f"{launch['shared_bytes'] / 1024:.1f}",
            f"{launch['occupancy']:.0%}",
            f"{launch['warp_instructions'] / 1e6:.3f}",
            megabytes(launch["moved_bytes"]),
            megabytes(row["floor_bytes"]) if first else "",
            f"{row['moved_to_floor']:.2f}" if first else "",
            f"{row['moved_to_expected']:.3f}" if first else "",
            f"{tensor_flops / 1e9:.2f}" if tensor_flops else "",
            f"{launch['shared_conflicts'] / launch['shared_wavefronts']:.1%}"
            if launch["shared_conflicts"]
            else "0",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(document: dict[str, Any]) -> str:
    head = (
        "op | shape | kernel | grid | block | registers | shared KB | occupancy | 10^6 warp instr. | "
        "moved MB | floor MB | moved / floor | moved / expected | tensor GFLOP | bank conflicts"
    )
    lines = [
        "# Static figures of the CUDA kernels",
        "",
        "Generated by `static.py` (nvcc "
        f"{document['nvcc']}); not measured on a GPU. README.md says what the columns mean.",
    ]
    for arch, target in static_compiler.TARGETS.items():
        lines += ["", f"## {target}", "", f"| {head} |", "|---" * len(head.split("|")) + "|"]
        notes = []
        for row in document["rows"]:
            if row["arch"] != arch:
                continue
            lines += kernel_lines(row)
            for reason, count in row["again"].items():
                notes.append(f"{row['op']} {row['shape']}: again {megabytes(count)} MB, {reason}")
            if row["conflicts_reason"]:
                notes.append(f"{row['op']} {row['shape']}: conflicts, {row['conflicts_reason']}")
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def differences(old: list[Row], new: list[Row]) -> list[str]:
    """In words; cases that only the committed file has count, unless only some were run."""
    key = lambda row: (row["arch"], row["op"], row["shape"])  # noqa: E731
    before = {key(row): row for row in old}
    messages = []
    for row in new:
        other = before.get(key(row))
        if other is None:
            messages.append(f"{key(row)}: not in the committed table")
            continue
        for name in row:
            if name != "launches" and row[name] != other.get(name):
                messages.append(f"{key(row)}: {name} {other.get(name)} -> {row[name]}")
        if len(row["launches"]) != len(other["launches"]):
            messages.append(
                f"{key(row)}: {len(other['launches'])} -> {len(row['launches'])} launches"
            )
        for now, then in zip(row["launches"], other["launches"]):
            for name in now:
                if now[name] != then.get(name):
                    messages.append(
                        f"{key(row)}: {now['kernel']}: {name} {then.get(name)} -> {now[name]}"
                    )
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of a simulated build")
    parser.add_argument("simulator", type=Path, help="folder of the built simulator")
    parser.add_argument("--ops", nargs="*", default=[], help="only these ops; nothing is written")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    args = parser.parse_args()
    site, simulator = args.site.resolve(), args.simulator.resolve()
    build, rows = count(site, simulator, args.ops)
    found = static_compiler.resources(next((site / "mllama_kernels").glob("_C*.so")))
    add_resources(rows, found)
    document = {"nvcc": build["cuda"], "rows": rows}
    messages = failures(rows, found)
    if args.check:
        committed = json.loads(RESULTS.read_text())
        if committed["nvcc"] != document["nvcc"]:
            print(f"the committed table is of nvcc {committed['nvcc']}: rules checked, counts not")
        else:
            messages += differences(committed["rows"], rows)
            missing = {(r["op"], r["shape"]) for r in committed["rows"]} - {
                (r["op"], r["shape"]) for r in rows
            }
            messages += [] if args.ops else [f"{case}: no longer a case" for case in missing]
    elif args.ops:
        print(table(document))
    else:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        TABLE.write_text(table(document))
    if messages:
        raise SystemExit("\n".join(messages))


if __name__ == "__main__":
    main()
