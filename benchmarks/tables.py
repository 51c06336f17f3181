"""A run in words and as Markdown tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.case import OURS, PLAIN
from benchmarks.runs import RESULTS

DTYPES = ("bfloat16", "float32", "float16")


def table(header: list[str], rows: list[list[str]], text: int = 1) -> str:
    """A Markdown table; every column after the first, or the first few that are text, is right-aligned."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
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


def _figure(run: dict[str, Any]) -> str:
    name = Path(run["file"]).with_suffix(".svg")
    return f"\n\n![times faster than PyTorch]({name})" if (RESULTS / name).exists() else ""


def run_page(run: dict[str, Any]) -> str:
    """All of one run."""
    return f"""# {run["file"].removesuffix(".json")}

{machine_in_words(run)}. Made from [`{run["file"]}`]({run["file"]}), which has every round and error.

Ceilings of this machine in the same run: {ceilings_in_words(run)}.{load_in_words(run)}

## Ops

{op_table(run, DTYPES) if run["rows"] else "Not part of this run."}{_figure(run)}

## Model

{model_table(run) if run["model"] else "Not part of this run."}

## Training

{training_table(run) if run["training"] else "Not part of this run."}

## Not timed

{not_run(run)}
"""
