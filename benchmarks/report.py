"""Tables from committed result files: one beside each file, and the README's section on speed.

    python -m benchmarks.report [--check]

Nothing is measured here. --check writes nothing and fails if a table is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.case import OURS, PLAIN
from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DTYPES = ("bfloat16", "float32", "float16")  # the README shows the first
PARTS = ("ops", "model", "training")
BEGIN, END = "<!-- speed: made by `python -m benchmarks.report` -->", "<!-- end of speed -->"


def committed(folder: Path = RESULTS) -> list[Path]:
    """The result files that git knows; all where there is no git. One's own runs stay out."""
    try:
        answer = subprocess.run(
            ["git", "ls-files", "*.json"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return sorted(folder.glob("*.json"))
    return sorted(folder / name for name in answer.stdout.split())


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The runs, oldest first, each with its ``file``."""
    early = {"training": []}  # older files have no such part
    runs = [early | json.loads(path.read_text()) | {"file": path.name} for path in paths]
    return sorted(runs, key=lambda run: run["started"])


def newest(runs: list[dict[str, Any]], kind: str, part: str) -> dict[str, Any] | None:
    """The latest run on a kind of device that has all of a part: rows of two runs are never mixed.

    One that was kept to fewer instructions than its CPU has is there for its own table alone.
    """
    fits = [run for run in runs if run["machine"]["kind"] == kind and part in run["parts"]]
    fits = [run for run in fits if not run["machine"].get("kept_to")]
    return fits[-1] if fits else None


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def time_of(us: float) -> str:
    for unit, size in (("us", 1.0), ("ms", 1e3)):
        if us < 999.5 * size:
            return f"{us / size:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def times(ratio: dict[str, float]) -> str:
    """Median and range of the per-round ratios."""
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def sizes(shape: dict[str, Any], leave_out: tuple[str, ...] = ()) -> str:
    kept = {name: size for name, size in shape.items() if name not in leave_out}
    return ", ".join(
        f"{name} {size}" if isinstance(size, int) else str(size) for name, size in kept.items()
    )


def machine_in_words(run: dict[str, Any]) -> str:
    machine, versions = run["machine"], run["versions"]
    if machine["kind"] == "cuda":
        name = f"{machine['gpu']} ({machine.get('power.limit', '?')} W)"
        libraries = f"CUDA {versions['cuda']}, cuDNN {versions['cudnn']}"
    else:
        instructions = machine["cpu_capability"]
        if kept_to := machine.get("kept_to"):
            instructions += ", all that was used of it: " + ", ".join(
                f"{variable}={value}" for variable, value in kept_to.items()
            )
        name = f"{machine['threads']} threads of an {machine['cpu']} ({instructions})"
        libraries = f"Python {versions['python']}"
    dirty = ", with local changes" if run["dirty"] else ""
    return (
        f"{name}, torch {versions['torch']}, {libraries}, transformers {versions['transformers']}; "
        f"commit {run['commit']}{dirty}, {run['started'][:10]}"
    )


def ceilings_in_words(run: dict[str, Any]) -> str:
    ceiling = run["ceilings"]
    products = [
        f"{value:g} TFLOP/s in {name.removeprefix('matmul_tflops_')} matrix products"
        for name, value in ceiling.items()
        if name.startswith("matmul")
    ]
    parts = [f"{ceiling['copy_gbps']:g} GB/s copying", f"{ceiling['read_gbps']:g} GB/s reading"]
    return ", ".join(parts + products)


def all_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [*run["rows"], *run["model"], *run["training"]]


def load_in_words(run: dict[str, Any]) -> str:
    """How busy a CPU was: figures of a machine that did other work as well are no absolute ones."""
    loads = [row["state"]["before"].get("load") for row in all_rows(run)]
    known = [load for load in loads if load is not None]
    if not known:
        return ""
    least, most = min(known), max(known)
    return f" The load average was {least:.1f} to {most:.1f} on {run['machine']['cores']} cores."


def best_peer(row: dict[str, Any]) -> dict[str, Any] | None:
    peers = [i for i in row["impls"] if i["name"] != OURS and i["status"] == "timed"]
    return min(peers, key=lambda impl: impl["us"]["median"], default=None)


def op_table(run: dict[str, Any], dtypes: tuple[str, ...]) -> str:
    cells = []
    for row in [row for row in run["rows"] if row["dtype"] in dtypes]:
        head = [f"`{row['op']}` {sizes(row['shape'])}", row["dtype"]]
        mine, plain, best = goals.timed(row), goals.timed(row, PLAIN), best_peer(row)
        if mine is None:
            cells.append([*head, "not measured", "", "", ""])
            continue
        cells.append(
            [
                *head,
                time_of(mine["us"]["median"]),
                f"{mine['share_of_floor']:.0%}",
                times(plain["ours_is_faster"]) if plain else "",
                f"{times(best['ours_is_faster'])} {best['name']}" if best else "",
            ]
        )
    header = ["op", "dtype", "time", "of floor", "plain PyTorch", "fastest peer"]
    return table(header, cells)


def model_table(run: dict[str, Any]) -> str:
    cells = []
    for row in run["model"]:
        for impl in row["impls"]:
            if impl["status"] != "timed":
                continue
            ratio = [
                f"{impl[f'ours_is_faster_{what}']['median']:.2f}x" if impl["name"] != OURS else ""
                for what in ("first_token", "token")
            ]
            cells.append(
                [
                    f"{impl['name']}, {sizes(row['shape'])}",
                    row["dtype"],
                    time_of(1e3 * impl["first_token_ms"]["median"]),
                    ratio[0],
                    f"{impl['tokens_per_s']:.3g}",
                    f"{impl['share_of_floor']:.0%}",
                    ratio[1],
                    f"{impl['peak_gib']:g} GiB" if "peak_gib" in impl else "",
                ]
            )
    header = ["model", "dtype", "first token", "ours is faster", "tokens/s", "of floor"]
    return table([*header, "ours is faster", "memory"], cells)


def training_table(run: dict[str, Any]) -> str:
    cells = []
    for row in run["training"]:
        for impl in row["impls"]:
            if impl["status"] != "timed":
                continue
            cells.append(
                [
                    f"{impl['name']}, {sizes(row['shape'])}",
                    row["dtype"],
                    time_of(impl["us"]["median"]),
                    f"{impl['share_of_floor']:.0%}",
                    times(impl["ours_is_faster"]) if impl["name"] != OURS else "",
                    f"{impl['peak_gib']:g} GiB" if "peak_gib" in impl else "",
                ]
            )
    header = ["training step", "dtype", "time", "of floor", "ours is faster", "memory"]
    return table(header, cells)


def not_run(run: dict[str, Any]) -> str:
    """The peers that gave no time, once per reason."""
    reasons: dict[str, set[str]] = {}
    for row in all_rows(run):
        for impl in row["impls"]:
            if impl["status"] != "timed":
                text = f"{impl['status']}: {impl['reason']}"
                reasons.setdefault(text, set()).add(impl["name"])
    lines = [f"- {', '.join(sorted(names))}: {reason}" for reason, names in sorted(reasons.items())]
    lines += [f"- {op}: {reason}" for op, reason in run["skipped"].items()]
    return "\n".join(lines)


def run_report(run: dict[str, Any]) -> str:
    """All of one run."""
    return f"""# {run["file"].removesuffix(".json")}

{machine_in_words(run)}. Made from [`{run["file"]}`]({run["file"]}), which has every round and error.

Ceilings of this machine in the same run: {ceilings_in_words(run)}.{load_in_words(run)}

## Ops

{op_table(run, DTYPES) if run["rows"] else "Not part of this run."}

## Model

{model_table(run) if run["model"] else "Not part of this run."}

## Training

{training_table(run) if run["training"] else "Not part of this run."}

## Not timed

{not_run(run)}
"""


def goal_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for goal in goals.GOALS:
        part = goals.part_of(goal)
        value = goals.value_of(goal, newest(runs, goal.device, part))
        sign = ">=" if goals.MEASURES[goal.measure][1] else "<="
        measured = ["", ""]
        if value is not None:
            measured = [goals.in_words(goal, value), "yes" if goals.reached(goal, value) else "no"]
        rows.append([goal.what, f"{sign} {goals.in_words(goal, goal.target)}", *measured])
    return table(["goal", "target", "measured", "reached"], rows)


def run_section(run: dict[str, Any], parts: list[str]) -> str:
    """Where it was measured, then the tables of these parts."""
    name = run["file"].removesuffix(".json")
    text = f"""Measured on {machine_in_words(run)}. This machine reached {ceilings_in_words(run)}: the
floors that shares are of.{load_in_words(run)} [All of this run](benchmarks/results/{name}.md)."""
    if "ops" in parts and (RESULTS / f"{name}.svg").exists():
        text += f"\n\n![times faster than PyTorch](benchmarks/results/{name}.svg)"
    tables = {
        "ops": lambda: op_table(run, DTYPES[:1]),
        "model": lambda: model_table(run),
        "training": lambda: training_table(run),
    }
    return "\n\n".join([text, *(tables[part]() for part in parts)])


def readme_section(runs: list[dict[str, Any]]) -> str:
    """What stands between the two markers of the README."""
    texts = [
        "Ratios are how many times faster ours is: the median of interleaved rounds and their range."
    ]
    for kind in (goals.GPU, goals.CPU):
        found = {part: newest(runs, kind, part) for part in PARTS}
        if kind == goals.GPU and not any(found.values()):
            texts.append("There is no GPU run yet: the GPU goals below have no figures.")
        for run in runs:
            parts = [part for part, source in found.items() if source is run]
            texts += [run_section(run, parts)] if parts else []
    texts.append(f"The goals; those without a figure are not measured yet.\n\n{goal_table(runs)}")
    return "\n\n".join(texts)


def replaced(text: str, section: str) -> str:
    """The README with its section on speed."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def outputs() -> dict[Path, str]:
    """Every file that is made here, and what it should hold."""
    runs = read(committed())
    made = {RESULTS / f"{run['file'].removesuffix('.json')}.md": run_report(run) for run in runs}
    return made | {README: replaced(README.read_text(), readme_section(runs))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is old")
    options = parser.parse_args(arguments)
    old = [p for p, text in outputs().items() if not p.exists() or p.read_text() != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(outputs()[path])
    return 1 if options.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
