"""Times decoding on one rank and on several, and what they exchange, and writes one JSON file.

    python -m benchmarks.scale [--dtype bfloat16 float32] [--rounds N] [--quick]

On a CPU: text layers of the 11B's width and its head, on two ranks of one thread beside one rank of two
threads. Where there are GPUs: the 11B on 1, 2 and 4 of them, and the 90B on 4. All weights are random, and
the same on any number of ranks. The file is benchmarks/scale.json, or --output; a quick run writes none
unless it is told where.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mllama
from benchmarks import machine
from benchmarks.budget import Budget
from benchmarks.ceilings import GB
from benchmarks.model import TOLERANCE, difference
from benchmarks.scale_ranks import Crew, CrewFailed, Task, Ways
from benchmarks.scenario import FULL, Layers, Scenario
from benchmarks.shapes import VOCAB
from benchmarks.timing import Spread, interleave, ratios, significant
from mllama.memory import free_bytes

FORMAT = 1
OUTPUT = machine.ROOT / "benchmarks" / "scale.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# The least number of times that so many ranks make the tokens of one in a time.
CPU_GOALS, GPU_GOALS = {2: 0.8}, {2: 1.7, 4: 2.9}
FLOOR_GOAL = 0.6  # of the 90B on 4 GPUs, the share of the bandwidth that decoding reads with
SLICE = Layers(text=4, cross=(), local=1, global_=1, taps=(0,))
LARGE = Layers(100, tuple(range(3, 100, 5)), 32, 8, (3, 7, 15, 23, 30))
LARGE_SIZES = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}


def jobs(dtypes: Sequence[str], quick: bool, gpus: int) -> list[tuple[Task, list[Ways]]]:
    """What is measured, and on what: the first is what the others are held against."""
    if gpus:
        scenario = Scenario(1, 128, 16 if quick else 128)
        bfloat16 = torch.bfloat16
        few = [Ways(ranks, 1, "cuda") for ranks in (1, 2, 4) if ranks <= gpus]
        found = [(Task("11B", FULL, VOCAB, bfloat16, scenario), few)]
        if gpus >= 4 and not quick:
            task = Task("90B", LARGE, VOCAB, bfloat16, scenario, LARGE_SIZES)
            found.append((task, [Ways(4, 1, "cuda")]))
        return found
    layers = Layers(1, (), 1, 1, (0,)) if quick else SLICE
    vocabulary, scenario = (VOCAB // 16 if quick else VOCAB), Scenario(1, 32, 8 if quick else 17)
    name = f"{layers.text} text layer{'s' * (layers.text > 1)} of the 11B"
    ways = [Ways(1, 2), Ways(2, 1)]
    return [(Task(name, layers, vocabulary, DTYPES[d], scenario), ways) for d in dtypes]


def needed_bytes(task: Task, ways: Sequence[Ways]) -> int:
    """What all processes on a host take: of each the embedding, and in sum one model per way, with a seventh
    more for what is made of it meanwhile and for libraries."""
    config = task.config()
    table = config.vocab_size * config.hidden_size
    with torch.device("meta"):
        model = mllama.MllamaForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters())
    elements = sum(whole + (way.ranks - 1) * table for way in ways)
    return int(1.15 * elements * task.dtype.itemsize)


def measure(task: Task, ways: Sequence[Ways], rounds: int, budget: Budget) -> dict[str, Any]:
    """The row of a task, ready for JSON. Raises: CrewFailed."""
    device = torch.device(ways[0].device)
    before = machine.state(device)
    with ExitStack() as stack:
        crews = [stack.enter_context(Crew(one, task)) for one in ways]
        for crew in crews:
            crew.ready()
        budget.say(f"{task.model}, {task.dtype}: logits are compared")
        expected = crews[0].ask("logits")[0]
        records: list[dict[str, Any]] = []
        for crew in crews:
            found = [difference(logits, expected) for logits in crew.ask("logits")]
            record = {"name": crew.ways.name, "ranks": crew.ways.ranks, "status": "timed"}
            record["threads"] = crew.ways.threads
            record["difference"] = significant(max(found), 3)
            record["bytes_per_step"] = crew.ask("bytes_per_step")
            record["exchange"] = crew.ask("exchange")[0]
            records.append(record)
            crew.ask("generate")  # captures graphs, and touches what was allocated
        right = [r["difference"] <= TOLERANCE[task.dtype] for r in records]
        for record, is_right in zip(records, right):
            if not is_right:
                reason = f"logits differ by {record['difference']} of those of {records[0]['name']}"
                record |= {"status": "wrong", "reason": reason}
        timed = [(c, r) for c, r, is_right in zip(crews, records, right) if is_right]

        def run(crew: Crew) -> tuple[list[dict[str, float]], float]:
            budget.say(f"{task.model}, {task.dtype}: {crew.ways.name}")
            return crew.ask("generate"), sum(crew.ask("read"))

        found_rounds = interleave([partial(run, crew) for crew, _ in timed], rounds, budget)
        latencies = [crew.ask("latency") for crew, _ in timed]
    seconds = [[answers[0]["token"] for answers, _ in rows] for rows in found_rounds]
    for (_, record), rows, latency in zip(timed, found_rounds, latencies, strict=True):
        record |= figures(rows, latency, record["bytes_per_step"], task)
    if records[0]["status"] == "timed":
        for (_, record), own in list(zip(timed, seconds, strict=True))[1:]:
            record["times_the_first"] = ratios(own, seconds[0]).to_json()
    return {
        "model": task.model,
        "dtype": str(task.dtype).removeprefix("torch."),
        "text_layers": task.layers.text,
        "vocabulary": task.vocabulary,
        "batch": task.scenario.batch,
        "prompt": task.scenario.prompt,
        "new": task.scenario.new,
        "state": {"before": before, "after": machine.state(device)},
        "contenders": records,
    }


def figures(
    rounds: Sequence[tuple[list[dict[str, float]], float]],
    latency: Sequence[dict[str, list[float]]],
    nbytes: Sequence[int],
    task: Task,
) -> dict[str, Any]:
    """Of one contender: from rounds of what each rank says and what all of them read in GB/s right after."""
    if not rounds:
        return {"status": "left out", "reason": "the run was interrupted"}
    tokens = [answers[0]["token"] for answers, _ in rounds]
    floors = [sum(nbytes) / (rate * GB) for _, rate in rounds]
    found: dict[str, Any] = {
        "token_ms": Spread.of([1e3 * t for t in tokens]).to_json(),
        "token_rounds_ms": [significant(1e3 * t, 5) for t in tokens],
        "tokens_per_s": significant(task.scenario.batch / median(tokens)),
        "first_token_ms": Spread.of([1e3 * a[0]["first_token"] for a, _ in rounds]).to_json(),
        "cpu_ms_per_token": significant(
            1e3 * median(sum(one["cpu"] for one in a) for a, _ in rounds)
        ),
        "read_gbps_rounds": [significant(rate) for _, rate in rounds],
        "floor_token_ms": significant(1e3 * median(floors)),
        "share_of_floor": significant(ratios(tokens, floors).median, 3),
    }
    if alone := latency[0]:
        found["alone_us"] = {
            name: Spread.of([1e6 * t for t in bursts]).to_json() for name, bursts in alone.items()
        }
        count = 2 * task.layers.text
        expected = count * median(alone["all_reduce"]) + median(alone["all_gather"])
        found["alone_share"] = significant(expected / median(tokens), 3)
    if any(one["exchanges"] for one in rounds[0][0]):
        # The rank that waits least for another shows what the exchanges themselves take.
        least = [min(one["exchanging"] for one in answers) for answers, _ in rounds]
        most = [max(one["exchanging"] for one in answers) for answers, _ in rounds]
        found["exchanges_per_step"] = rounds[0][0][0]["exchanges"]
        found["exchanging_ms"] = Spread.of([1e3 * s for s in least]).to_json()
        found["exchanging_and_waiting_ms"] = Spread.of([1e3 * s for s in most]).to_json()
        shares = [s / t for s, t in zip(least, tokens, strict=True)]
        found["exchanging_share"] = significant(median(shares), 3)
    return found


def judged(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The figures to reach, those of which there is a value."""
    targets = GPU_GOALS if kind == "cuda" else CPU_GOALS
    found = []
    for row in rows:
        for one in row["contenders"]:
            what = f"{row['model']}, {row['dtype']}, {one['name']}"
            value, target = None, targets.get(one["ranks"])
            if "times_the_first" in one and target is not None:
                value = one["times_the_first"]["median"]
                what += f", tokens/s as a multiple of {row['contenders'][0]['name']}"
            elif row["model"] == "90B" and "share_of_floor" in one:
                value, target = one["share_of_floor"], FLOOR_GOAL
                what += ", share of the bandwidth floor"
            if value is not None:
                reached = value >= target
                found.append({"what": what, "target": target, "value": value, "reached": reached})
    return found


def line(row: dict[str, Any]) -> str:
    """A row on the terminal."""
    text = f"{row['model']}, {row['dtype']}"
    for one in row["contenders"]:
        text += f"\n  {one['name']:24}"
        if one["status"] != "timed":
            text += f"{one['status']}: {one['reason']}"
            continue
        text += f"{one['tokens_per_s']:8.4g} tokens/s, {one['share_of_floor']:.0%} of the floor"
        if "exchanging_ms" in one:
            text += f", exchanges {one['exchanging_ms']['median']:.3g} ms ({one['exchanging_share']:.1%})"
        if "alone_us" in one:
            text += f", alone {one['alone_us']['all_reduce']['median']:.3g} us each"
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="on a CPU (default: both)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of all contenders (default: 7)")
    parser.add_argument("--quick", action="store_true", help="one layer, a small head, two rounds")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the file to write (default: {OUTPUT.relative_to(machine.ROOT)}; of a quick run none)",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; expected the name of a file")
    if options.quick:
        options.rounds = min(options.rounds, 2)
    elif options.output is None:
        options.output = OUTPUT
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, budget = parse(arguments), Budget()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    document: dict[str, Any] = {
        "format": FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.scale", *(arguments or sys.argv[1:])]),
        "machine": machine.describe(device),
        "gpus": torch.cuda.device_count(),
        "versions": machine.versions(),
        **machine.commit(),
        "rows": [],
        "failed": {},
    }
    with budget.interruptible():
        for task, ways in jobs(options.dtype, options.quick, torch.cuda.device_count()):
            name = f"{task.model}, {str(task.dtype).removeprefix('torch.')}"
            free, needed = free_bytes(torch.device("cpu")), needed_bytes(task, ways)
            if budget.interrupted:
                break
            if device.type == "cpu" and free is not None and free < needed:
                reason = f"takes {needed / GB:.1f} GB, {free / GB:.1f} GB are free"
                document["failed"][name] = reason
                print(f"{name}: not measured: {reason}", flush=True)
                continue
            try:
                row = measure(task, ways, options.rounds, budget)
            except CrewFailed as error:
                document["failed"][name] = str(error)
                print(f"{name}: not measured: {error}", flush=True)
                continue
            document["rows"].append(row)
            print(line(row), flush=True)
    document |= {
        "goals": judged(document["rows"], device.type),
        "interrupted": budget.interrupted,
        "seconds": round(time.perf_counter() - clock),
    }
    for goal in document["goals"]:
        reached = "reached" if goal["reached"] else "missed"
        print(f"{goal['what']}: {goal['value']:.3g}, to reach {goal['target']}: {reached}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {options.output}")
    is_wrong = any(c["status"] != "timed" for row in document["rows"] for c in row["contenders"])
    return 1 if document["failed"] or is_wrong or budget.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
